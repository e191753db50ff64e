"""`distal submit`: a run as a job of a Ray cluster, through the cluster's dashboard.

Only the configuration and the user's own modules are sent: pool and run stay where every node sees them. A
job has no state of its own: submitted again, a run resumes from its directory, as always.
"""

from __future__ import annotations

import ast
import asyncio
import logging
import os
import re
import shlex
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from distal.cluster import knock
from distal.config import Config, ScoreConfig
from distal.errors import ConfigError, DistalError, RunConflict, UserError, one_line
from distal.records import OPTIONAL, Result

CONFIG = "distal.yaml"
_REACH = (
    "give the port of the dashboard, on the head or through a tunnel: `ssh -L 8265:127.0.0.1:8265 HEAD`, or `kubectl "
    "port-forward service/NAME-head-svc 8265`, and http://127.0.0.1:8265"
)
_OVERRIDING = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # what Ray's client takes in place of the address it is given
_STOPPED = 143  # a job is stopped by SIGTERM
_POLL_S = 0.5


@dataclass(frozen=True)
class SubmitResult(Result):
    """A job that the cluster has accepted.

    Attributes:
        state: submitted, or, once it has ended, succeeded, failed or stopped.
        job: its submission id.
        address: of the dashboard.
        run: the run directory.
        config_sha256: of the keys that can change a bit of the answer.
        commands: to show its state (`status`), to follow its output (`logs`), and to end it (`stop`).
        exit_code: of the job, once it has ended.
    """

    state: str
    job: str
    address: str
    run: str
    config_sha256: str
    commands: dict[str, str]
    exit_code: int | None = field(default=None, metadata=OPTIONAL)


def submit(config: Config | ScoreConfig, address: str, options: Sequence[str] = ()) -> SubmitResult:
    """Have a cluster run the command that this configuration is for: `distal run`, `score` or `compare`.

    The job takes no slot: it waits while others work, so without resources of its own it always fits, and Ray puts it
    on the head. It joins the cluster that it is submitted to, whatever `ray.address` says.

    Args:
        config: with absolute paths that every node of the cluster sees.
        address: http://HOST:PORT of its dashboard.
        options: of that command.

    Raises:
        UserError: nobody answers there, or the token is missing or wrong.
        RunConflict: a job for the same run has not ended yet.
        ConfigError: `train.command` names a file that the job would not find.
    """
    address = _checked(address)
    files = shipped(config, Path.cwd())
    metadata = {"run": config.run, "config_sha256": config.digest("")}
    with _written(files) as folder, _client(address) as client:
        for job in client.list_jobs():
            if (job.metadata or {}).get("run") == config.run and not job.status.is_terminal():
                raise RunConflict(
                    f"{config.run}: {job.submission_id} is working on this run ({job.status.value.lower()}); wait "
                    f"until it is done, or stop it and submit again: {_commands(job.submission_id, address)['stop']}"
                )
        job_id = client.submit_job(
            entrypoint=shlex.join(["distal", config.command, CONFIG, *options]),
            submission_id=f"distal-{re.sub(r'[^A-Za-z0-9_-]', '-', Path(config.run).name)}-{uuid.uuid4().hex[:8]}",
            runtime_env={"working_dir": folder},
            metadata=metadata,
            entrypoint_num_cpus=0,
        )
    commands = _commands(job_id, address)
    return SubmitResult("submitted", job_id, address, metadata["run"], metadata["config_sha256"], commands)


@contextmanager
def _written(files: Mapping[str, bytes]) -> Iterator[str]:
    """A folder with some files, while it is needed."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        yield folder


def follow(submitted: SubmitResult, say: Callable[[str], None]) -> SubmitResult:
    """Pass on the output of a job until it has ended.

    Returns:
        The result with the state and the exit code of the job.

    Raises:
        DistalError: the connection was lost, which the job does not need.
    """
    import aiohttp

    async def tail() -> None:
        async for lines in client.tail_job_logs(submitted.job):
            say(lines.removesuffix("\n"))

    with _client(submitted.address) as client:
        try:
            asyncio.run(tail())
            while not (info := client.get_job_info(submitted.job)).status.is_terminal():
                time.sleep(_POLL_S)
        except (OSError, RuntimeError, aiohttp.ClientError) as error:
            raise DistalError(
                f"the connection to {submitted.address} was lost ({one_line(error)}); the job goes on "
                f"unless its cluster is gone: {submitted.commands['logs']}"
            ) from error
    state = info.status.value.lower()
    code = info.driver_exit_code
    if code is None:
        code = {"succeeded": 0, "stopped": _STOPPED}.get(state, DistalError.exit_code)
        if state == "failed":
            say(f"{submitted.job}: {info.message}")
    return replace(submitted, state=state, exit_code=code)


def shipped(config: Config | ScoreConfig, folder: Path) -> dict[str, bytes]:
    """What a job needs beside an installed distal: its configuration, and the user's modules.

    A module is sent when a key names it (`config.functions`), or a module that is sent imports it, and Python finds it
    in `folder`: then the Python files of its top-level package. Any other must be installed on the nodes. Of data,
    nothing is sent.

    Returns:
        Relative paths and contents.
    """
    if config.train_command is not None:
        from distal.train.command import check_command

        check_command(config.train_command)
        _refuse_local_files(config.train_command, folder)
    config = config.with_values({"ray.address": "local"})  # which RAY_ADDRESS, set for every job, turns into its own
    sent = {CONFIG: yaml.safe_dump(config.to_record(), sort_keys=False).encode()}
    waiting = [function.partition(":")[0] for function in config.functions().values()]
    seen = {"distal"}  # is installed; in a checkout it would be found
    while waiting:
        top = waiting.pop().partition(".")[0]
        if top in seen:
            continue
        seen.add(top)
        for path in _python_files(top, folder):
            sent[str(path.relative_to(folder))] = path.read_bytes()
            waiting += _imported(path)
    return sent


def _python_files(top: str, folder: Path) -> list[Path]:
    """The files of a top-level module or package, when it is in the folder."""
    spec = PathFinder.find_spec(top, [str(folder)])
    if spec is None:
        return []
    if spec.submodule_search_locations is None:
        return [Path(spec.origin)] if spec.origin and spec.origin.endswith(".py") else []
    return sorted(path for root in spec.submodule_search_locations for path in Path(root).rglob("*.py"))


def _imported(path: Path) -> Iterator[str]:
    """Names of the modules that a file imports, wherever it does; relative ones are of its own package."""
    try:
        tree = ast.parse(path.read_bytes(), str(path))
    except SyntaxError as error:
        raise ConfigError(f"{path}: cannot be imported ({one_line(error)})") from None
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module


def _refuse_local_files(command: str, folder: Path) -> None:
    for word in shlex.split(command):
        if not Path(word).is_absolute() and (folder / word).is_file():
            raise ConfigError(
                f"train.command: {word!r} is a file of this directory, which a submitted job does not see; give an "
                "absolute path that every node of the cluster sees"
            )


def _checked(address: str) -> str:
    """The address of a dashboard at which something listens: Ray itself would try for minutes."""
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)
        if not host or not port or parts.scheme not in ("http", "https"):
            raise ValueError("not http://HOST:PORT")
        knock(host, port)
    except (OSError, ValueError) as error:
        raise _nobody(address, error) from None
    return address.rstrip("/")


def _nobody(address: str, error: Exception) -> UserError:
    return UserError(f"--address: no dashboard of a Ray cluster at {address} ({one_line(error)}); {_REACH}")


@contextmanager
def _client(address: str) -> Iterator[Any]:
    """Ray's client of a dashboard, with the token of the environment or of ~/.ray/auth_token.

    Raises:
        UserError: it is no dashboard, or the token is missing or wrong; at any request.
        DistalError: the connection is lost, or a request is refused.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray reads it when it is imported
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # Ray reports every package that it uploads
    try:
        try:
            with _without(_OVERRIDING):
                client = JobSubmissionClient(address)
        except (OSError, RuntimeError, ValueError) as error:
            raise _nobody(address, error) from error
        yield client
    except (OSError, RuntimeError) as error:
        raise DistalError(
            f"{address}: the cluster does not take the request ({one_line(error)}); if that stays so, dashboard.log "
            "and dashboard_agent.log on its head say why"
        ) from error
    except AuthenticationError as error:
        reason = "refuses this token" if "authentication failed" in str(error).lower() else "asks for a token"
        raise UserError(
            f"--address: {address} {reason}; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or the file ~/.ray/auth_token "
            "to what `ray get-auth-token` prints on the head"
        ) from None
    finally:
        logging.disable(before)


@contextmanager
def _without(names: Sequence[str]) -> Iterator[None]:
    """An environment in which some variables are not set."""
    taken = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(taken)


def _commands(job: str, address: str) -> dict[str, str]:
    """What to type for a job. With an address, Ray looks for a token only in the mode `token`."""
    mode = f"RAY_AUTH_MODE={os.environ['RAY_AUTH_MODE']} "
    options: Mapping[str, str] = {"status": "", "logs": "--follow ", "stop": ""}
    return {verb: f"{mode}ray job {verb} --address {address} {option}{job}".strip() for verb, option in options.items()}
