"""The mutants: decisive lines, each changed as a slip would change it, above all where the defect would be silent."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One change.

    Attributes:
        file: of the working tree.
        old, new: the text that is replaced, which must be there exactly once.
        killers: default tests of which one must fail, files or parts of them; those that need no Ray come first.
        equivalent: why no test can fail; empty where one must.
    """

    name: str
    file: str
    old: str
    new: str
    killers: tuple[str, ...]
    equivalent: str = ""

    def apply(self, text: str) -> str:
        """The mutated text. Raises ValueError when the mutant no longer applies."""
        n = text.count(self.old)
        if n != 1:
            raise ValueError(f"no longer applies: {self.old!r} is in {self.file} {n} times")
        return text.replace(self.old, self.new)


def _of(file: str, killers: str, *changes: tuple[str, ...]) -> Iterator[Mutant]:
    """The mutants of one file. Each change: name, old, new, and why it is equivalent, if it is."""
    for name, old, new, *equivalent in changes:
        yield Mutant(name, f"distal/{file}", old, new, tuple(f"tests/{each}" for each in killers.split()), *equivalent)


PLAN = _of(
    "score/plan.py",
    "score/test_plan.py",
    (
        "plan: void entries of a queue are taken",
        "if self.get(block) == rank and suits(block):",
        "if block in self and suits(block):",
    ),
    (
        "plan: a block that was passed over is lost",
        "            heappush(self._heap, (self[block], block))\n        if found",
        "            pass\n        if found",
    ),
    (
        "plan: committed blocks are handed out again",
        "if (row, block) not in self._done:\n                self._wait",
        "if True:\n                self._wait",
    ),
    ("plan: a checkpoint counts twice", "        if row in self._published:\n            return\n", ""),
    ("plan: rows that never came are waited for", "self._missing = self._missing[: self._n_rows]", "pass"),
    (
        "plan: rows that never came are left",
        "[left - len(never) for left in self._left]",
        "[left for left in self._left]",
    ),
    (
        "plan: blocks of a lost actor stay its own",
        "self._owner = {block: owner for block, owner in self._owner.items() if owner != actor}",
        "pass",
    ),
    ("plan: what was queued behind the culprit is blamed", "self.actor_left(actor)[:1]:", "self.actor_left(actor):"),
    ("plan: failures are not forgotten", "        self._attempts.pop(task.block, None)\n", ""),
    ("plan: the actor at fault is not forgotten", "        self._failed_at.pop(task.block, None)\n", ""),
    ("plan: a failed block stays with its actor", "        self._owner.pop(task.block, None)\n", ""),
    ("plan: one attempt more", "if self._attempts[block] >= MAX_ATTEMPTS:", "if self._attempts[block] > MAX_ATTEMPTS:"),
    (
        "plan: a second hand-out before others have one",
        "if len(in_hand) <= depth else None",
        "if len(in_hand) < IN_FLIGHT else None",
    ),
    (
        "plan: a row beyond the barrier",
        "for row in self._waiting[block] if row < self._limit",
        "for row in self._waiting[block] if row <= self._limit",
    ),
    (
        "plan: rows in the order of a set",
        "ready = sorted(row for row in self._waiting[block] if row < self._limit)",
        "ready = list({-row for row in self._waiting[block] if row < self._limit})\n        ready = [-row for row in ready]",
    ),
    (
        "plan: the stretch of a row at a barrier",
        "bisect_right(self._barriers, ready[0])",
        "bisect_right(self._barriers, ready[0] - 1)",
    ),
    ("plan: a hand-out crosses a barrier", "[row for row in ready if row < stop]", "[row for row in ready]"),
    (
        "plan: whether a hand-out is the last one is asked too often",
        "last = len(stretch) == len(ready) and self._complete",
        "last = self._complete",
        "a row that is ready and not in the hand-out is not committed, so the block is not complete",
    ),
    ("plan: no barrier before the second one", "if below else None,", "if below > 1 else None,"),
    ("plan: a hand-out without rows", "return max(1, min(MAX_ROWS", "return max(0, min(MAX_ROWS"),
    ("plan: hand-outs do not get smaller", "waiting // (2 * IN_FLIGHT * len(self._in_hand))", "waiting"),
    ("plan: the newest row is the oldest", "min(self._waiting[block], default", "max(self._waiting[block], default"),
    ("plan: waiting rows are not counted", "            self._n_waiting[row] += 1\n", ""),
    ("plan: counting comes last", "            rank = -1\n", "            rank = self._n_rows\n"),
    ("plan: a block in two hands", "        if block in self._busy:\n            return\n", ""),
    ("plan: votes are counted again and again", "if barrier is None or block in self._counted:", "if barrier is None:"),
    ("plan: votes are counted a row early", "for row in range(barrier))", "for row in range(barrier - 1))"),
    (
        "plan: a single actor does not try again",
        "lambda block: alone or self._failed_at",
        "lambda block: self._failed_at",
    ),
    (
        "plan: an actor at fault tries again",
        "lambda block: alone or self._failed_at.get(block) != actor",
        "lambda block: True",
    ),
    (
        "plan: free blocks before own ones",
        "        yield actor\n        yield None\n",
        "        yield None\n        yield actor\n",
    ),
    ("plan: the poorest is robbed", "most = max(map(len", "most = min(map(len"),
    ("plan: one block has counted for all", "len(self._counted) == len(self._waiting)", "bool(self._counted)"),
    ("plan: counted once for all barriers", "        self._counted.clear()\n", ""),
    (
        "plan: nothing goes on after a barrier",
        "        for block in range(len(self._waiting)):\n            self._enqueue(block)\n\n    def published",
        "\n    def published",
    ),
    (
        "plan: a barrier behind the last row",
        "barrier is None or barrier >= self._n_rows)",
        "barrier is None or barrier > self._n_rows)",
    ),
    (
        "plan: rows that did not come yet are pending",
        "for row in self._published if row < self._n_rows)",
        "for row in range(self._n_rows))",
    ),
    ("plan: a slot is used twice", "free = max(0, slots - training_slots)", "free = slots"),
    ("plan: fewer slots than none", "free = max(0, slots - training_slots)", "free = slots - training_slots"),
)

ELIMINATE = _of(
    "score/eliminate.py",
    "score/test_eliminate.py",
    ("eliminate: a tie is left out", "& (mode_count <= theta)", "& (mode_count < theta)"),
    ("eliminate: a barrier too early", "range(n_rows // 2 + 1, n_rows, _STEP)", "range(n_rows // 2, n_rows, _STEP)"),
    ("eliminate: a row to come is forgotten", "int(reached[0]) + n_rows - row)", "int(reached[0]) + n_rows - row - 1)"),
    ("eliminate: one sample more than the budget", "cumsum() >= budget)", "cumsum() > budget)"),
    ("eliminate: those at theta do not remain", "counts[: theta + 1].sum()", "counts[:theta].sum()"),
    ("eliminate: the first block decides", "np.sum(histograms, axis=0).cumsum()", "histograms[0].cumsum()"),
    ("eliminate: samples that are not eligible count", "mode_count[eligible & (n_missing == 0)]", "mode_count"),
    (
        "eliminate: those left out are counted again",
        "mode_count[eligible & (n_missing == 0)]",
        "mode_count[eligible]",
        "theta never grows, so one that was left out stays above it",
    ),
    (
        "eliminate: those left out come back",
        "eligible & (n_missing == 0) & (mode_count <= theta)",
        "eligible & (mode_count <= theta)",
        "theta never grows, so one that was left out stays above it",
    ),
    ("eliminate: fewer than the budget", "if len(reached) else n_rows", "if len(reached) else n_rows - row"),
)

TOPK = _of(
    "acquire/topk.py",
    "acquire/test_topk.py",
    ("topk: a tie at the threshold loses", "candidates.score >= self._threshold", "candidates.score > self._threshold"),
    (
        "topk: NaN is a score",
        "able = candidates.score >= self._threshold",
        "able = ~(candidates.score < self._threshold)",
    ),
    ("topk: the first one left out is not kept", "self._keep = k + 1", "self._keep = k"),
    ("topk: no margin", "(self.index, self.hash, self.margin, -self.score)", "(self.index, self.hash, -self.score)"),
    (
        "topk: the hash before the margin",
        "(self.index, self.hash, self.margin, -self.score)",
        "(self.index, self.margin, self.hash, -self.score)",
    ),
    (
        "topk: equal hashes in the order of arrival",
        "(self.index, self.hash, self.margin, -self.score)",
        "(self.hash, self.margin, -self.score)",
    ),
    ("topk: the smallest score first", "self.margin, -self.score)", "self.margin, self.score)"),
    ("topk: the largest margin first", "self.margin, -self.score)", "-self.margin, -self.score)"),
    ("topk: a threshold of too few", "if len(self._best) == self._keep:", "if len(self._best):"),
    (
        "topk: the best score is the threshold",
        "self._threshold = self._best.score[-1]",
        "self._threshold = self._best.score[0]",
    ),
    ("topk: everything is kept", "if len(self._best) >= 2 * self._keep:", "if False:"),
    (
        "topk: margins of others",
        "np.concatenate([self.margin, other.margin])",
        "np.concatenate([other.margin, self.margin])",
    ),
    (
        "topk: groups of others",
        "np.concatenate([self.group, other.group])",
        "np.concatenate([other.group, self.group])",
    ),
    ("topk: a group has one too many", "np.arange(len(groups))) < n)", "np.arange(len(groups))) <= n)"),
    ("topk: those without a group are one", " < n) | (groups < 0)", " < n)"),
    (
        "topk: the cap comes after the cut",
        "self._best = ranked.at(slice(self._keep))",
        "self._best = self._best.ranked().at(slice(self._keep))",
    ),
    ("topk: a tie of margins alone", "same_score & (chosen.margin", "(chosen.margin"),
)

K_CENTER = _of(
    "acquire/k_center.py",
    "acquire/test_k_center.py",
    ("k_center: a chosen one is chosen again", "nearest[chosen[: place + 1]] = -1", "nearest[chosen[:place]] = -1"),
    ("k_center: rounding is a distance", "        distance[distance <= _ROUNDING * scale] = 0\n", ""),
    (
        "k_center: the last of the farthest",
        "int(np.argmax(nearest))",
        "len(nearest) - 1 - int(np.argmax(nearest[::-1]))",
    ),
    ("k_center: only the last one chosen", "np.minimum(nearest, distance, out=nearest)", "nearest[:] = distance"),
    ("k_center: float32", "x = points.astype(np.float64)", "x = points.astype(np.float32)"),
    ("k_center: the largest product", "scale - 2 * (x @ x[best])", "scale - (x @ x[best])"),
)

BATCH = _of(
    "acquire/batch.py",
    "acquire/test_batch.py acquire/test_strategies.py",
    ("batch: ties without the cycle", 'mix64("tie", self.seed, self.cycle, keys)', 'mix64("tie", self.seed, 0, keys)'),
    ("batch: ties without the seed", 'mix64("tie", self.seed, self.cycle, keys)', 'mix64("tie", 0, self.cycle, keys)'),
    (
        "batch: power draws without the cycle",
        'mix64("power", self.seed, self.cycle, keys)',
        'mix64("power", self.seed, 0, keys)',
    ),
    (
        "batch: power draws without the seed",
        'mix64("power", self.seed, self.cycle, keys)',
        'mix64("power", 0, self.cycle, keys)',
    ),
    ("batch: a strategy draws without the cycle", 'seed_for("strategy", seed, cycle)', 'seed_for("strategy", seed, 0)'),
    ("batch: a strategy draws without the seed", 'seed_for("strategy", seed, cycle)', 'seed_for("strategy", 0, cycle)'),
    (
        "batch: indices within the stripe",
        "return Candidates(np.arange(*span)",
        "return Candidates(np.arange(stop - start)",
    ),
    (
        "batch: the margin of the first checkpoint",
        'read_recorded("margin", self.last_row, *span)',
        'read_recorded("margin", 0, *span)',
    ),
    (
        "batch: the margin decides though asked not to",
        "if config.breaks_ties_by_margin:",
        "if self.assignments.recorded:",
    ),
    (
        "batch: candidates are rounded down",
        "math.ceil(self.config.candidate_factor * budget)",
        "math.floor(self.config.candidate_factor * budget)",
    ),
    ("batch: more than there is", "budget = min(budget, len(chosen))", "pass"),
    ("batch: outputs in another order", "{name: values[back] for", "{name: values[order] for"),
    ("batch: votes of other samples", "[:, index[inside] - block.start]", "[:, np.sort(index[inside]) - block.start]"),
    (
        "batch: final is the first checkpoint",
        'rows if "all" in needs else rows[-1:]',
        'rows if "all" in needs else rows[:1]',
    ),
    ("batch: scores of other samples", "[index[at] - first]", "[np.sort(index[at]) - first]"),
    ("batch: a score of 0 is drawn", "np.where(score > 0, score, np.nan)", "np.where(score > 0, score, 1e-9)"),
    ("batch: another law", "np.log(-np.log(uniform))", "np.log(uniform)"),
    ("batch: positions below 0", "or positions.min() < 0 or", "or"),
    ("batch: positions beyond the candidates", "positions.max() >= n:", "positions.max() > n:"),
    ("batch: positions that are no integers", "or not np.issubdtype(positions.dtype, np.integer)", ""),
    ("batch: another selection than expected", "if expected not in (None, selection.sha256):", "if False:"),
    ("batch: a file names what is barred", "barred += inside[~flags[", "barred += inside[False & flags["),
    (
        "batch: a file names what is barred, in a later stripe",
        "~flags[indices[inside] - start]",
        "~flags[indices[inside] * 0]",
    ),
)

GROUPS = _of(
    "acquire/batch.py",
    "acquire/test_groups.py",
    ("batch: those without a group have one", "np.append(numbers, -1)[places]", "np.append(numbers, 1)[places]"),
    (
        "batch: groups are numbered within a stripe",
        "(sample_keys(encoded.dictionary.to_pylist()) >> np.uint64(1)).astype(np.int64)",
        "np.arange(len(encoded.dictionary))",
    ),
)

STREAM = _of(
    "reduce/stream.py",
    "reduce/test_stream.py",
    (
        "stream: a score where nothing was scored",
        "np.where(scored, FROM_VOTES[measure](votes[window]), np.nan)",
        "FROM_VOTES[measure](votes[window])",
    ),
    ("stream: no window", "Votes(read[window.rows(len(read))]", "Votes(read"),
    (
        "stream: the votes of the first window",
        "FROM_VOTES[measure](votes[window])",
        "FROM_VOTES[measure](votes[Window()])",
    ),
    (
        "stream: the first recorded row",
        "read_recorded(name, reduction.rows[-1]",
        "read_recorded(name, reduction.rows[0]",
    ),
    (
        "stream: a recorded value that is missing",
        '            _require(scored <= ~np.isnan(last), stripe, f"{assignments.path}: array {name}")\n',
        "",
    ),
    ("stream: a class where nothing was scored", "votes[Window()]), -1)", "votes[Window()]), 0)"),
    (
        "stream: an assignment that is missing",
        "        _require(eligible <= complete, stripe, str(reduction.assignments.path))\n",
        "",
    ),
    (
        "stream: samples that were not left out",
        "if n != reduction.remaining[block]:",
        "if n > reduction.remaining[block]:",
    ),
    (
        "stream: samples that should be left out",
        "if n != reduction.remaining[block]:",
        "if n < reduction.remaining[block]:",
    ),
    (
        "stream: the samples of all later blocks",
        "scored[start - stripe.start :][:block_size]",
        "scored[start - stripe.start :]",
    ),
    (
        "stream: blocks are counted within the stripe",
        "block = start // block_size",
        "block = (start - stripe.start) // block_size",
    ),
    ("stream: random without the cycle", "(reduction.seed, reduction.cycle, keys)", "(reduction.seed, 0, keys)"),
    ("stream: random without the seed", "(reduction.seed, reduction.cycle, keys)", "(0, reduction.cycle, keys)"),
    (
        "stream: keys of the first stripe",
        'reduction.pool.columns(*span, "sample_key")',
        'reduction.pool.columns(0, len(stripe), "sample_key")',
    ),
    (
        "stream: stripes that cut blocks",
        "return max(1, samples // block_size) * block_size",
        "return max(block_size, samples)",
    ),
    ("stream: the first sample of the stripe", "sample {stripe.start + lacking[0]}", "sample {lacking[0]}"),
)

MEASURES = _of(
    "reduce/measures.py",
    "reduce/test_measures.py",
    (
        "measures: one checkpoint too many",
        "return 1 - votes.mode_count / votes.n_rows",
        "return 1 - votes.mode_count / (votes.n_rows + 1)",
    ),
    ("measures: the tail of the authors", "n_rows * 3 // 4 :", "n_rows // 4 * 3 :"),
    (
        "measures: a tie in the tail of the authors",
        "weights[n_rows * 3 // 4 :] += n_rows + 1",
        "weights[n_rows * 3 // 4 :] += 1",
    ),
    (
        "measures: the oldest weighs most",
        "np.arange(votes.n_rows - 1, -1, -1, dtype=np.float64)",
        "np.arange(votes.n_rows, dtype=np.float64)",
    ),
    ("measures: squares of counts", "/ votes.n_rows**2", "/ votes.n_rows"),
    (
        "measures: a margin without the runner-up",
        "(votes.tally.mode_count - votes.tally.runner_up_count)",
        "votes.tally.mode_count",
    ),
    (
        "measures: confidence is uncertainty",
        "return 1 - recorded.astype(np.float64)",
        "return recorded.astype(np.float64)",
    ),
    (
        "measures: least confidence is the largest",
        'in [0, 1 - 1 / C]."""\n    return recorded.astype(np.float64)',
        'in [0, 1 - 1 / C]."""\n    return 1 - recorded.astype(np.float64)',
    ),
    ("measures: random without the cycle", 'mix64("random", seed, cycle, keys)', 'mix64("random", seed, keys)'),
    ("measures: random of more bits than float32 has", ">> np.uint64(40)) / 2.0**24", ">> np.uint64(11)) / 2.0**53"),
    ("measures: one that is missing is complete", "= n_missing == 0", "= n_missing <= 1"),
)

KERNELS = _of(
    "kernels.py",
    "test_kernels.py reduce/test_measures.py",
    ("kernels: few classes, the counts of the tile before", "        flat[:] = 0\n", ""),
    (
        "kernels: few classes, missing is a class",
        "        for c in range(C):\n",
        "        for c in range(counts.shape[0]):\n",
    ),
    (
        "kernels: few classes, the last partial tile",
        "range(0, N, counts.shape[1])",
        "range(0, N - N % counts.shape[1], counts.shape[1])",
    ),
    (
        "kernels: few classes, the first class",
        "largest[i] = of_class[i] if of_class[i] > largest[i]",
        "largest[i] = of_class[i] if c == 0",
    ),
    (
        "kernels: many classes, the counts of the tile before",
        "flat[np.uint64(i) * width + np.uint64(clipped[i])] = zero",
        "pass",
    ),
    (
        "kernels: many classes, missing is a class",
        "k if k > largest[i] and clipped[i] != last else",
        "k if k > largest[i] else",
    ),
    (
        "kernels: many classes, the last partial tile",
        "range(0, N, counts.shape[0])",
        "range(0, N - N % counts.shape[0], counts.shape[0])",
    ),
    ("kernels: counts of one byte", "dtype = np.min_scalar_type(n_rows)", "dtype = np.dtype(np.uint8)"),
    ("kernels: tally, the larger class wins a tie", "(k == mode_count and c < mode)", "(k == mode_count and c > mode)"),
    (
        "kernels: tally, the larger class is the runner-up",
        "(k == runner_up_count and c < runner_up)",
        "(k == runner_up_count and c > runner_up)",
    ),
    ("kernels: tally, missing is a class", "        counts[C] = 0\n", ""),
    ("kernels: tally, the mode that was is forgotten", "runner_up, runner_up_count = mode, mode_count\n", "pass\n"),
    ("kernels: the first change", "for t in range(1, T):", "for t in range(2, T):"),
    ("kernels: the last change a row early", "t + 1 if row[i] != final[i]", "t if row[i] != final[i]"),
    ("kernels: weights, missing is a class", "        sums[C] = 0.0\n", ""),
    ("kernels: weights of the sample before", "            sums[c] = 0.0\n", ""),
    ("kernels: ranks from the largest", "np.lexsort((order, group))", "np.lexsort((-order, group))"),
)

ELIGIBILITY = _of(
    "pool/eligibility.py",
    "pool/test_eligibility.py",
    (
        "eligibility: the sample at the limit",
        "draws <= np.uint64(self.largest_draw)",
        "draws < np.uint64(self.largest_draw)",
    ),
    ("eligibility: the limit without the seed", 'mix64("limit", seed, keys[flags])', 'mix64("limit", 0, keys[flags])'),
    ("eligibility: any draws make the limit", "                smallest.partition(limit - 1)\n", ""),
    (
        "eligibility: the limit of the last stripe",
        'np.concatenate([smallest, mix64("limit", seed, keys[flags])])',
        'mix64("limit", seed, keys[flags])',
    ),
    ("eligibility: the limit counts unreadable ones", "keys[flags])", "keys)"),
    ("eligibility: a part without the cycle", 'mix64("subpool", self.seed, cycle, ', 'mix64("subpool", self.seed, 0, '),
    ("eligibility: a part without the seed", 'mix64("subpool", self.seed, cycle, ', 'mix64("subpool", 0, cycle, '),
    ("eligibility: the other part", "(draws < share * 2.0**64)", "(draws >= share * 2.0**64)"),
    (
        "eligibility: labelled ones of another range",
        "~self.ledger.asked(start, stop)",
        "~self.ledger.asked(0, stop - start)",
    ),
    ("eligibility: unreadable ones", 'pc.equal(samples["status"], OK).to_numpy()', "np.ones(len(samples), bool)"),
    ("eligibility: labelled ones", "flags = flags & ~self.ledger.asked(start, stop)", "pass"),
)

HASHING = _of(
    "hashing.py",
    "test_hashing.py",
    (
        "hashing: the purpose plays no part",
        "np.asarray(sample_key(purpose), dtype=np.uint64)",
        "np.asarray(0, dtype=np.uint64)",
    ),
    ("hashing: only the last part", "state = _splitmix(state ^ part", "state = _splitmix(part"),
    ("hashing: a sum of parts", "state = _splitmix(state ^ part", "state = _splitmix(state) ^ _splitmix(part"),
    ("hashing: another byte order", 'digest(), "little")', 'digest(), "big")'),
    ("hashing: a digest of the key order", "sort_keys=True", "sort_keys=False"),
    ("hashing: seeds with a sign", "int(mix64(purpose, *parts)) >> 1", "int(mix64(purpose, *parts))"),
    ("hashing: another shift", "(x >> np.uint64(27))", "(x >> np.uint64(26))"),
)

CHECKPOINTS = _of(
    "artifacts/checkpoints.py",
    "artifacts/test_checkpoints.py",
    (
        "checkpoints: the manifest before the weights",
        "        write_bytes(place / file, data)\n",
        '        create_json(place / MANIFEST, {"index": index, "epoch": epoch, "file": file, "sha256": checksum, '
        '"inputs": inputs, "metrics": metrics or {}})\n        write_bytes(place / file, data)\n',
    ),
    (
        "checkpoints: the last commit wins",
        "        create_json(place / MANIFEST,",
        "        __import__('distal.storage').storage.write_json(place / MANIFEST,",
    ),
    ("checkpoints: the weights have one name", 'file = f"weights-{checksum[:12]}.pt"', 'file = "weights.pt"'),
    ("checkpoints: weights of other inputs", 'if read_json(place / MANIFEST)["inputs"] != inputs:', "if False:"),
    ("checkpoints: weights that have changed", "if sha256(data) != checkpoint.sha256:", "if False:"),
    (
        "checkpoints: a folder is a commit",
        "return [index for index in Numbered(folder, digits=4).numbers() if is_committed(folder, index)]",
        "return Numbered(folder, digits=4).numbers()",
    ),
    ("checkpoints: the queue is complete early", "set(range(self._n)) -", "set(range(self._n - 1)) -"),
    ("checkpoints: one that is late is missed at once", "> VISIBLE_S:", ">= 0:"),
)

WEIGHTS = _of(
    "model/weights.py",
    "model/test_weights.py",
    (
        "weights: strides are part of the weights",
        "return value.detach().cpu().contiguous()",
        "return value.detach().cpu()",
    ),
    ("weights: code is loaded", "weights_only=True", "weights_only=False"),
)

STORAGE = [
    *_of(
        "storage/files.py",
        "test_storage.py",
        ("storage: the last creator wins", "os.link(temporary, path)", "os.replace(temporary, path)"),
        (
            "storage: a write in place",
            "        temporary.write_bytes(data)\n        replace(temporary, path)",
            "        path.write_bytes(data)",
        ),
        (
            "storage: the name before the bytes",
            "    if is_durable():\n        fsync(temporary)\n    temporary.replace(path)\n",
            "    temporary.replace(path)\n",
        ),
        (
            "storage: created before its bytes are there",
            "        if is_durable():\n            fsync(temporary)\n        try:",
            "        try:",
        ),
        ("storage: a quota is no full disk", "{errno.ENOSPC, errno.EDQUOT}", "{errno.ENOSPC}"),
        (
            "storage: a failed write leaves its file",
            "            with suppress(FileNotFoundError):\n                temporary.unlink()\n",
            "            pass\n",
        ),
    ),
    *_of(
        "storage/sealed.py",
        "test_storage.py",
        ("storage: a record that has changed", "if seal != found:", "if False:"),
        (
            "storage: another format",
            "if found != FORMAT:\n        raise unknown_format(path, found)\n    try",
            "if False:\n        raise unknown_format(path, found)\n    try",
        ),
        ("storage: sealed bytes that have changed", "if sealed[:64] != sha256(data).encode():", "if False:"),
    ),
    *_of(
        "storage/parquet.py",
        "test_storage.py",
        ("storage: a table that has changed", "    check_parquet(path)\n    with", "    with"),
        ("storage: half of a table is hashed", "((0, place), (place + len(_NO_SEAL), size))", "((0, place),)"),
    ),
    *_of(
        "storage/numbered.py",
        "test_numbered.py",
        (
            "numbered: the content is made before the number is chosen",
            "            last = self.last()\n            made = content(last)\n",
            "            made = content(self.last())\n            last = self.last()\n",
        ),
        (
            "numbered: a number that was taken meanwhile is used",
            "if create(self.path(number), made):",
            "if create(self.path(number), made) or True:",
        ),
    ),
    *_of(
        "storage/folders.py",
        "test_storage.py",
        ("storage: temporary files have names", ' if not name.startswith("."))', ")"),
        (
            "storage: names in any order",
            "return sorted(name for name in os.listdir(folder)",
            "return list(name for name in reversed(sorted(os.listdir(folder)))",
        ),
        ("storage: young files are swept", "_last_change(path) >= older_than:", "_last_change(path) <= older_than:"),
        (
            "storage: files that are no leftovers are swept",
            " for name in names if name.endswith(_TEMPORARY))",
            " for name in names)",
        ),
    ),
]

ARRAYS = _of(
    "artifacts/arrays.py",
    "artifacts/test_assignments.py",
    (
        "arrays: a chunk that has changed",
        "google_crc32c.value(bytes(data[:-4])) != int.from_bytes",
        "False and int.from_bytes",
    ),
    ("arrays: an empty block is deleted", '"write_empty_chunks": True', '"write_empty_chunks": False'),
    ("arrays: a lost chunk is the fill value", "                if complete:\n", "                if False:\n"),
    ("arrays: a missing chunk reads as class 0", "region[target] = self.fill_value", "region[target] = 0"),
    ("arrays: the last partial chunk", "range(start // n, -(-stop // n))", "range(start // n, max(1, stop // n))"),
    (
        "arrays: leftovers are chunks",
        "for name in names_in(self.chunk_path(row)) if name.isdigit()}",
        'for name in (n.partition(".")[0] for n in reversed(names_in(self.chunk_path(row))))} | {9}',
    ),
    (
        "arrays: the start of a chunk",
        "chunk[\n                    tuple(slice(low - b, high - b)",
        "chunk[\n                    tuple(slice(0, high - low)",
    ),
    ("arrays: no checksum is asked for", "if codecs != [ZstdCodec, Crc32cCodec]:", "if False:"),
)

LEDGER = _of(
    "artifacts/ledger.py",
    "artifacts/test_ledger.py",
    (
        "ledger: declined samples were not asked",
        "for indices in (self.indices, self.declined):",
        "for indices in (self.indices,):",
    ),
    ("ledger: asked of the whole pool", "flags[indices[low:high] - start] = True", "flags[: high - low] = True"),
    (
        "ledger: the sample behind the range",
        "np.searchsorted(indices, [start, stop])",
        "np.searchsorted(indices, [start, stop], side='right')",
    ),
    ("ledger: declined samples are not in the hash", "self.labels, self.declined  # the", "self.labels  # the"),
    (
        "ledger: labels are not in the hash",
        "self.indices, self.labels, self.declined  #",
        "self.indices, self.declined  #",
    ),
    ("ledger: parts of the hash have no borders", "parts = [len(self)], self", "parts = [0], self"),
    ("ledger: files in any order", "np.lexsort((written, pa.concat", "np.lexsort((-written, pa.concat"),
    ("ledger: a file supersedes itself", "& (written[:-1] < written[1:])", ""),
    ("ledger: a label twice", "again & ~has_label[:-1] & has_label[1:]", "again & has_label[1:]"),
    ("ledger: declined after a label", "again & ~has_label[:-1] & has_label[1:]", "again & ~has_label[:-1]"),
    ("ledger: labelled and still declined", "        declined[:-1] &= ~later\n", ""),
    ("ledger: the first file counts", "later = again & ~has_label[:-1]", "later = again & has_label[:-1]"),
    (
        "ledger: two per rank, less one",
        "len(labels) >= LABELS_PER_RANK * workers",
        "len(labels) >= LABELS_PER_RANK * workers - 1",
    ),
    ("ledger: one class is enough", "n_classes >= _LEAST_CLASSES", "n_classes >= _LEAST_CLASSES - 1"),
    (
        "ledger: every table has labels",
        'name.startswith("labels") and name.endswith(".parquet")',
        'name.endswith(".parquet")',
    ),
)

ANSWERS = _of(
    "labels/answers.py",
    "labels/test_answers.py::test_what_counts labels/test_answers.py::test_the_race_that_two_importers_run "
    "labels/test_answers.py::test_a_correction_that_is_taken_back_is_heard labels/test_answers.py",
    (
        "answers: skipped says what unsure says",
        "(self.label, self.status) != (other.label, other.status)",
        "self.label != other.label",
    ),
    ("answers: an older export counts", "return self.time > before.time", "return True"),
    ("answers: a newer export does not count", "return self.time > before.time", "return self.time < before.time"),
    ("answers: at the same time the first counts", " or self.time == before.time:", ":"),
    ("answers: the first word counts", "if who not in words or answer.supersedes(words[who]):", "if who not in words:"),
    ("answers: any word counts", "if who not in words or answer.supersedes(words[who]):", "if True:"),
    ("answers: annotators are one", "who = answer.sample_index, answer.annotator\n", 'who = answer.sample_index, ""\n'),
    (
        "answers: samples in the order of answers",
        "for _, said in sorted(by_sample.items()):",
        "for _, said in by_sample.items():",
    ),
    (
        "answers: skipped outweighs unsure",
        "next((answer for answer in said if answer.status == UNSURE), said[0])",
        "said[0]",
    ),
    (
        "answers: skipped is a vote",
        "labelled = [answer for answer in said if answer.status == LABELED]",
        "labelled = [*said]",
    ),
    ("answers: the last annotator is first", "        return labelled[0]\n", "        return labelled[-1]\n"),
    ("answers: a tie has a majority", "votes[0][1] > votes[1][1]:", "votes[0][1] >= votes[1][1]:"),
    ("answers: a majority under reask", 'if policy == "majority" and votes', "if votes"),
    (
        "answers: the first answer for the majority",
        "next(answer for answer in labelled if answer.label == votes[0][0])",
        "labelled[0]",
    ),
    (
        "answers: a word taken back is known",
        "who not in before or answer.supersedes(before[who])]",
        "who not in before]",
    ),
    ("answers: a repetition is new", "who not in before or answer.supersedes(before[who])]", "True]"),
    (
        "answers: one that lost the race is lost",
        "if create_bytes(path, bytes(table_bytes(table))):",
        "if create_bytes(path, bytes(table_bytes(table))) or True:",
    ),
    (
        "answers: a lost file is not missed",
        "for number in range(n_imports(folder)) for answer",
        "for number in range(n_imports(folder)) if import_path(folder, number).exists() for answer",
    ),
    ("answers: a file of another number", ".get(_NUMBER) != str(number).encode():", ".get(_NUMBER) is None:"),
    ("answers: fewer files than there are", "max((int(match[1]) + 1 for match", "max((int(match[1]) for match"),
    (
        "answers: a first word is a change",
        "return before is not None and answer.differs_from(before)",
        "return before is None or answer.differs_from(before)",
    ),
    ("answers: another format", "if table.schema.names != SCHEMA.names:", "if False:"),
)

ASSIGNMENTS = _of(
    "artifacts/assignments.py",
    "artifacts/test_assignments.py",
    (
        "assignments: labels before what is recorded",
        "        for name, values in (recorded or {}).items():\n"
        "            self._arrays[name].write(where, values.astype(self._arrays[name].dtype, copy=False))\n"
        "        self._arrays[_ARRAY].write(where, labels)\n",
        "        self._arrays[_ARRAY].write(where, labels)\n"
        "        for name, values in (recorded or {}).items():\n"
        "            self._arrays[name].write(where, values.astype(self._arrays[name].dtype, copy=False))\n",
    ),
    (
        "assignments: laid out otherwise than recorded",
        "_lay_out(beside, *(kept[key] for key in _LAYOUT))",
        "_lay_out(beside, n_rows, n_samples, block_size, n_classes, recorded)",
    ),
    ("assignments: one class too many", "(labels >= self.n_classes) &", "(labels > self.n_classes) &"),
    ("assignments: unassigned is wrong", " & (labels != unassigned(self.dtype))", ""),
    (
        "assignments: no value for unassigned",
        "if n_classes <= np.iinfo(dtype).max:",
        "if n_classes <= int(np.iinfo(dtype).max) + 1:",
    ),
    (
        "assignments: any array commits a block",
        "return all(self.chunk(name, row, block).exists()",
        "return any(self.chunk(name, row, block).exists()",
    ),
    ("assignments: any array commits a row", "set.intersection(*", "set.union(*"),
    (
        "assignments: another layout than recorded",
        "if (array.shape, array.chunks, array.dtype, fill_value) != layout[:4]:",
        "if False:",
    ),
    (
        "assignments: another fill value than recorded",
        "(array.shape, array.chunks, array.dtype, fill_value) != layout[:4]",
        "(array.shape, array.chunks, array.dtype) != layout[:3]",
    ),
    (
        "assignments: recorded arrays are not checked",
        "for name in (*self.recorded, _ARRAY):\n            array",
        "for name in (_ARRAY,):\n            array",
    ),
    (
        "assignments: damaged flags stay",
        "            assignments._arrays[ELIGIBLE].write((slice(block.start, block.stop),), eligible(block.start, block.stop))\n",
        "",
    ),
    ("assignments: damaged chunks stay", "            self.chunk(name, row, block).unlink(missing_ok=True)\n", ""),
    (
        "assignments: the rows of another window",
        "array.read((slice(row, row + 1), columns), complete=complete) for row in rows]",
        "array.read((slice(i, i + 1), columns), complete=complete) for i, _ in enumerate(rows)]",
    ),
    (
        "assignments: a lost block is a value",
        "array.read((slice(row, row + 1), columns), complete=complete) for row in rows]",
        "array.read((slice(row, row + 1), columns), complete=False) for row in rows]",
    ),
)

PROCESSES = _of(
    "processes.py",
    "test_processes.py artifacts/test_lease.py",
    ("processes: any process with the id", "abs(process.create_time() - self.started) < 1 and ", ""),
    ("processes: a zombie lives", " and process.status() != psutil.STATUS_ZOMBIE", ""),
    (
        "processes: a host name is a machine",
        "if (self.host, self.machine) != (platform.node(), _machine()):",
        "if self.host != platform.node():",
    ),
)

CYCLES = _of(
    "artifacts/cycles.py",
    "artifacts/test_runs.py driver/test_writers.py",
    (
        "cycles: a start after scoring begins anew",
        'if self.marker("score") is None:\n                return {"assignments"',
        'if True:\n                return {"assignments"',
    ),
    (
        "cycles: what was left out outlives its assignments",
        'self.assignments.with_name(f"{self.assignments.name}.elimination")',
        'self.folder / self.assignments.stem.replace("assignments", "elimination")',
    ),
)

LEASE = _of(
    "artifacts/lease.py",
    "artifacts/test_lease.py driver/test_writers.py",
    (
        "lease: one that was released is held",
        "False if holder is None or holder.released else",
        "False if holder is None else",
    ),
    ("lease: a beat that goes on is not seen", "if lives or (lives is None and moved):", "if lives:"),
    ("lease: a beat is not waited for", "if lives is None and time.monotonic() - since < EXPIRY_S:", "if False:"),
    (
        "lease: the last one that takes over wins",
        "if create_json(self._path(number + 1), asdict(self._me)):",
        "if not write_json(self._path(number + 1), asdict(self._me)):",
    ),
    ("lease: a number that was given before", "if _leases(self._run).last() == number + 1:", "if True:"),
    (
        "lease: a driver does not look",
        "                if number > self.number:\n                    self._successor = holder\n                    return\n",
        "",
    ),
    (
        "lease: no look before a write",
        "        number, holder = self._latest()\n        if number > self.number:\n            self._successor = holder\n        self.check()",
        "        self.check()",
    ),
    (
        "lease: one that is superseded goes on",
        "        if self._successor is not None:\n            raise",
        "        if False:\n            raise",
    ),
    (
        "lease: a superseded driver leaves a lease",
        "        self._thread.join()\n        if self._successor is not None:\n            return\n",
        "        self._thread.join()\n",
        "it writes or removes its own lease alone, and the one with the largest number counts",
    ),
    ("lease: an end is no release", "replace(self._me, released=True)", "replace(self._me, released=False)"),
    ("lease: a beat that stands still", "beat=self._me.beat + 1", "beat=1"),
    (
        "lease: one that cannot be read is none",
        'return number, Holder("an unknown host", "", 0, 0.0, "unknown")',
        "continue",
    ),
    (
        "lease: what came to nothing stays",
        "            self._path(self.number).unlink(missing_ok=True)\n            with suppress(OSError)",
        "            with suppress(OSError)",
    ),
)

OTHERS = (
    *_of(
        "score/evaluate.py",
        "score/test_evaluate.py",
        ("evaluation: the other border of a bin", "/ _N_BINS, right=True)", "/ _N_BINS, right=False)"),
    ),
    *_of(
        "train/rank.py",
        "train/test_rank.py",
        (
            "train: augmentation without the epoch",
            'mix64("augment", self.job.seed, self.job.cycle, epoch, ',
            'mix64("augment", self.job.seed, self.job.cycle, 0, ',
        ),
        (
            "train: the order without the epoch",
            'seed_for("order", self.job.seed, self.job.cycle, epoch)',
            'seed_for("order", self.job.seed, self.job.cycle, 0)',
        ),
        (
            "train: the order without the seed",
            'seed_for("order", self.job.seed, self.job.cycle, epoch)',
            'seed_for("order", 0, self.job.cycle, epoch)',
        ),
        (
            "train: layers draw the same in every epoch",
            'seed_for("epoch", self.job.seed, self.job.cycle, epoch, self.rank)',
            'seed_for("epoch", self.job.seed, self.job.cycle, 0, self.rank)',
        ),
        (
            "train: layers of all ranks draw the same",
            'seed_for("epoch", self.job.seed, self.job.cycle, epoch, self.rank)',
            'seed_for("epoch", self.job.seed, self.job.cycle, epoch, 0)',
        ),
        (
            "train: layers draw on where they were",
            '        torch.manual_seed(seed_for("epoch", self.job.seed, self.job.cycle, epoch, self.rank))\n',
            "",
        ),
        (
            "train: the checkpoint before the state",
            "            write_sealed(self.job.state_path, serialize(state))\n            self._commit(epoch, loss)\n",
            "            self._commit(epoch, loss)\n            write_sealed(self.job.state_path, serialize(state))\n",
        ),
        (
            "train: an attempt that is superseded saves",
            "            check_owner(self.job.folder, self.job.owner)\n            state = {",
            "            state = {",
        ),
        ("train: no warm-up", "        self.warm_up()\n", ""),
    ),
    *_of(
        "score/actor.py",
        "score/test_actor.py",
        (
            "scorer: committed blocks are written again",
            "todo = [(row, ref) for row, ref in zip(task.rows, refs, strict=True) if not self._is_done(row, block)]",
            "todo = list(zip(task.rows, refs, strict=True))",
        ),
    ),
    *_of(
        "records.py",
        "test_records.py",
        ("records: the last block is too long", "min(start + block_size, n_samples))", "start + block_size)"),
        ("records: counted from the first checkpoint", "rows[::-1][:: self.every][::-1]", "rows[:: self.every]"),
        (
            "records: one row more",
            "rows = list(range(self.first, n_rows))",
            "rows = list(range(max(0, self.first - 1), n_rows))",
        ),
    ),
)

MUTANTS = [
    *PLAN,
    *ELIMINATE,
    *TOPK,
    *K_CENTER,
    *BATCH,
    *GROUPS,
    *STREAM,
    *MEASURES,
    *KERNELS,
    *ELIGIBILITY,
    *HASHING,
    *CHECKPOINTS,
    *WEIGHTS,
    *STORAGE,
    *ARRAYS,
    *ASSIGNMENTS,
    *LEDGER,
    *ANSWERS,
    *PROCESSES,
    *CYCLES,
    *LEASE,
    *OTHERS,
]
