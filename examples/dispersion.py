"""Load a finished run, plot error against label dispersion, and show the most dispersed images.

    distal run configs/quickstart.yaml
    python examples/dispersion.py runs/quickstart --out dispersion.png

The pool needs labels. In VS Code and Jupyter (with jupytext) the cells below open as a notebook.
"""

# %% The run, its last cycle, and what that cycle left on disk.
from __future__ import annotations

import argparse

import matplotlib.pyplot as plt
import numpy as np

import distal

parser = argparse.ArgumentParser(description="Plot error against label dispersion.")
parser.add_argument("run", nargs="?", default="runs/quickstart", help="run directory")
parser.add_argument("--out", default="dispersion.png", help="the figure: .png or .svg")
options = parser.parse_args()

run = distal.Run.open(options.run)
cycle = run.cycles()[-1]
pool = distal.Pool.open(cycle.config.pool.path)
assignments = distal.Assignments.open(cycle.assignments)
n = pool.n_samples

# %% Per scored sample: its dispersion, and whether the final network is wrong about it.
(labels,) = pool.columns(0, n, "label")  # -1: no label
scored = assignments.eligible(0, n) & (labels >= 0)
dispersion = distal.Scores.open(cycle.scores).read("dispersion", 0, n)
votes = assignments.read(0, n)  # (T checkpoints, n) predicted classes
wrong = votes[-1] != labels

# %% Dispersion has at most T values: the error of the samples that share each of them.
values, counts = np.unique(dispersion[scored], return_counts=True)
error = [wrong[scored & (dispersion == value)].mean() for value in values]

figure = plt.figure(figsize=(10, 4.4), layout="constrained")
left, right = figure.subfigures(1, 2, width_ratios=(1, 1.15))
axes = left.subplots()
axes.plot(values, error, color="tab:blue", zorder=1)
axes.scatter(values, error, s=8 + 300 * counts / counts.max(), color="tab:blue", edgecolor="white")
axes.axhline(wrong[scored].mean(), color="grey", linestyle="--", linewidth=1)
axes.set(
    xlabel=f"label dispersion over {len(votes)} checkpoints",
    ylabel="error of the final network",
    ylim=(0, 1),
    title="area: number of images; dashed: all of them",
)

# %% The head of the selection: the most dispersed images, with their most frequent classes.
batch = distal.Selection.read(cycle.selection)
chosen = batch.indices[:12]
images = pool.take(chosen)  # (k, C, H, W) uint8
panels = right.subplots(3, 4, squeeze=False).ravel()
for panel in panels:
    panel.axis("off")
for panel, index, image in zip(panels, chosen, images, strict=False):
    panel.imshow(image.transpose(1, 2, 0).squeeze(), cmap="gray")
    times = np.bincount(votes[:, index], minlength=assignments.n_classes)
    most = np.argsort(-times, kind="stable")[:2]
    title = "\n".join(f"{times[c]} {pool.classes[c]}" for c in most if times[c])
    panel.set_title(title, fontsize=8)
right.suptitle(
    "the most dispersed images, and how often each was assigned which class",
    fontsize=10,
)

# %%
figure.savefig(options.out, dpi=110)
print(f"{options.out}: error {error[-1]:.2f} at the largest dispersion, {wrong[scored].mean():.2f} over all")
