"""The files of docs/cluster parse, and say what SLURM, Kubernetes, KubeRay and this program read."""

from __future__ import annotations

import os
import re
import shlex
import stat
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from ruamel.yaml import YAML
from typer.main import get_command

from mixmerge.cli import app
from mixmerge.plan.graph import KINDS

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "cluster"
BATCHES = sorted(FOLDER.glob("*.sbatch"))
# https://slurm.schedmd.com/sbatch.html
SBATCH = {
    *("job-name", "nodes", "ntasks", "ntasks-per-node", "cpus-per-task", "gpus", "gpus-per-node", "mem", "time"),
    *("requeue", "output", "array"),
}
# https://ray-project.github.io/kuberay/reference/api/
RAYJOB = {"entrypoint", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "backoffLimit", "rayClusterSpec"}
CLUSTER = {"rayVersion", "headGroupSpec", "workerGroupSpecs"}
GROUP = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
CONTAINER = {"name", "image", "env", "resources", "volumeMounts"}


def documents() -> list[dict]:
    return list(YAML(typ="safe").load_all((FOLDER / "rayjob.yaml").read_text(encoding="utf-8")))


def pinned(package: str) -> str:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return next(line.partition("==")[2] for line in lines if line.startswith(f"{package}=="))


def options_of(command: str) -> set[str]:
    return {option for found in get_command(app).commands[command].params for option in found.opts}


@pytest.mark.parametrize("path", BATCHES, ids=lambda path: path.name)
def test_a_batch_file_is_bash_and_its_options_are_those_of_sbatch(path):
    checked = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "#!/bin/bash"
    asked = [line for line in lines if line.startswith("#SBATCH")]
    first = next(at for at, line in enumerate(lines) if line and not line.startswith("#"))
    assert asked == [line for line in lines[:first] if line.startswith("#SBATCH")], "SLURM reads none after a command"
    for line in asked:
        name, _, value = line.removeprefix("#SBATCH --").partition("=")
        assert name in SBATCH, line
        assert bool(value) == (name != "requeue"), line
    assert "set -euo pipefail" in lines


@pytest.mark.parametrize("name", ["ray.sbatch", "array.sbatch", "rayjob.yaml"])
def test_commands_in_the_files_have_options_that_there_are(name):
    text = (FOLDER / name).read_text(encoding="utf-8").replace("\\\n", " ")
    calls = re.findall(r"^(?!\s*#).*?\bmixmerge (run|step|plan) (.*)$", text, re.MULTILINE)
    assert calls
    for command, rest in calls:
        words = shlex.split(rest.rstrip("|").partition("</dev/null")[0])
        asked = {word for word in words if word.startswith("--")}
        assert asked <= options_of(command), (command, asked)


def test_the_job_of_kuberay_has_only_fields_that_kuberay_has():
    job, _ = documents()
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert job["spec"].keys() <= RAYJOB
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster.keys() == CLUSTER
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    assert groups[0].keys() <= GROUP - {"groupName", "replicas", "minReplicas", "maxReplicas"}
    for group in groups:
        assert group.keys() <= GROUP
        assert all(isinstance(value, str) for value in group["rayStartParams"].values()), "KubeRay takes strings"
        for container in group["template"]["spec"]["containers"]:
            assert container.keys() <= CONTAINER
            limits, requests = container["resources"]["limits"], container["resources"]["requests"]
            assert limits == requests, "Ray reads limits; a pod that has more is moved"
            assert all(isinstance(variable["value"], str) for variable in container["env"])


def test_all_pods_of_the_job_see_one_folder_and_steps_run_on_workers_alone():
    job, claim = documents()
    cluster = job["spec"]["rayClusterSpec"]
    out = shlex.split(job["spec"]["entrypoint"])
    mounts = set()
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        (container,), (volume,) = group["template"]["spec"]["containers"], group["template"]["spec"]["volumes"]
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        (mount,) = container["volumeMounts"]
        assert mount["name"] == volume["name"]
        mounts.add((mount["mountPath"], container["image"]))
    ((path, _),) = mounts
    assert out[out.index("--out") + 1].startswith(f"{path}/")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_the_versions_in_the_files_are_those_that_are_tested():
    job, _ = documents()
    image = (FOLDER / "Dockerfile").read_text(encoding="utf-8")
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == pinned("ray")
    assert f"torch=={pinned('torch')}" in image
    assert "[ray]" in image
    assert f"ray[default,train]=={pinned('ray')}" in image


def test_the_image_has_what_the_dashboard_of_ray_imports():
    """KubeRay sends the job to the dashboard's port; without these packages `ray start` of KubeRay's head ends."""
    image = (FOLDER / "Dockerfile").read_text(encoding="utf-8")
    extras = re.search(r"'ray\[([a-z,]+)\]==", image)
    assert extras is not None
    wanted = [Requirement(line) for line in requires("ray") or ()]
    brought = {
        wish.name.replace("-", "_")
        for wish in wanted
        for extra in extras.group(1).split(",")
        if wish.marker is None or wish.marker.evaluate({"extra": extra})
    }
    assert {"aiohttp", "aiohttp_cors", "opencensus", "prometheus_client", "py_spy"} <= brought


RAY = """\
#!/bin/bash
echo "$1 $SRUN_CPUS_PER_TASK $RAY_AUTH_MODE $RAY_AUTH_TOKEN" >> {log}
[ "$1" = start ] && exit {start}
[ "$1" = status ] && [ {start} = 1 ] && echo "no cluster here" && exit 1
exit 0
"""


def sent(tmp_path: Path, start: int) -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
    """`ray.sbatch` with programs that write down what they were told; `start`: how `ray start` ends."""
    programs, log = tmp_path / "venv" / "bin", tmp_path / "log"
    programs.mkdir(parents=True)
    told = RAY.format(log=log, start=start)
    written = {
        "activate": "",
        "scontrol": "#!/bin/bash\necho one\necho two\n",
        "srun": '#!/bin/bash\nwhile [ "${1#--}" != "$1" ]; do shift; done\nexec "$@"\n',
        "hostname": "#!/bin/bash\necho 10.0.0.1\n",
        "python": f'#!/bin/bash\nexec {sys.executable} "$@"\n',
        "ray": told,
        "mixmerge": told,
    }
    for name, text in written.items():
        (programs / name).write_text(text, encoding="utf-8")
        (programs / name).chmod(stat.S_IRWXU)
    slurm = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_PER_TASK": "32",
    }
    environment = {
        **os.environ,
        **slurm,
        "MIXMERGE_VENV": str(programs.parent),
        "PATH": f"{programs}:{os.environ['PATH']}",
    }
    command = ["bash", str(FOLDER / "ray.sbatch"), "recipe.yaml", str(tmp_path)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    return ran, [line.split() for line in log.read_text(encoding="utf-8").splitlines()]


def test_all_tasks_of_a_job_have_its_cores_and_one_token(tmp_path):
    ran, calls = sent(tmp_path, start=0)
    assert ran.returncode == 0, ran.stderr
    assert {call[0] for call in calls} >= {"status", "run"}
    assert {tuple(call[1:3]) for call in calls} == {("32", "token")}
    (token,) = {call[3] for call in calls}
    assert len(token) == 64
    assert token not in ran.stdout + ran.stderr


def test_a_job_whose_head_does_not_come_up_ends_with_a_line_and_runs_nothing(tmp_path):
    ran, calls = sent(tmp_path, start=1)
    assert ran.returncode == 1
    what = "ray.sbatch: no head of Ray came up at 10.0.0.1:20007: no cluster here; what it said itself is above\n"
    assert ran.stderr == what
    assert {call[0] for call in calls} == {"start", "status"}


def job(study, programs: Path, number: int, kind: str) -> subprocess.CompletedProcess[str]:
    """A task of an array of two; `srun` on a machine without SLURM: it runs what follows its options."""
    if not programs.exists():
        programs.mkdir(parents=True)
        step = f'[ "$1" = step ] && echo "$3" >> {programs}/steps && [ "$3" = "$FAILING" ] && exit 1'
        written = {
            "activate": "",
            "srun": '#!/bin/bash\n[ "$SRUN_CPUS_PER_TASK" = 8 ] || exit 3\nshift\nexec "$@"\n',
            "python": f'#!/bin/bash\nexec {sys.executable} "$@"\n',
            "mixmerge": f'#!/bin/bash\n{step}\nexec {sys.executable} -m mixmerge "$@"\n',
        }
        for name, text in written.items():
            (programs / name).write_text(text, encoding="utf-8")
            (programs / name).chmod(stat.S_IRWXU)
    told = {"SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_ID": str(number), "SLURM_CPUS_PER_TASK": "8"}
    places = {"MIXMERGE_VENV": str(programs.parent), "PATH": f"{programs}:{os.environ['PATH']}"}
    command = ["bash", str(FOLDER / "array.sbatch"), str(study.recipe), str(study.out), kind]
    environment = {**os.environ, **told, **places}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


def test_an_array_of_jobs_deals_out_the_steps_of_a_kind(study, tmp_path):
    programs = tmp_path / "venv" / "bin"
    for kind in ("base", "mixture"):
        for number in range(2):
            ran = job(study, programs, number, kind)
            assert ran.returncode == 0, ran.stderr
    assert (programs / "steps").read_text().split() == ["base/base", "mixture/general", "mixture/mix"]
    assert len(study.records()) == 3


def test_a_step_that_fails_keeps_no_other_of_its_job_from_being_done(study, tmp_path, monkeypatch):
    study.edit("  mix:\n", "  third: {mixture: {general: 0.25, safety: 0.75}}\n  mix:\n")
    monkeypatch.setenv("FAILING", "mixture/general")
    programs = tmp_path / "venv" / "bin"
    assert job(study, programs, 0, "base").returncode == 0
    ran = job(study, programs, 0, "mixture")
    assert ran.returncode == 1
    tried = (programs / "steps").read_text().split()[1:]
    assert tried[0] == "mixture/general"
    assert len(tried) == 2
    assert len(study.records()) == 2
    monkeypatch.delenv("FAILING")
    assert job(study, programs, 0, "mixture").returncode == 0
    assert len(study.records()) == 3


def test_a_plan_that_cannot_be_made_fails_the_job(study, tmp_path):
    study.recipe.unlink()
    ran = job(study, tmp_path / "venv" / "bin", 0, "base")
    assert ran.returncode != 0
    assert "recipe.yaml" in ran.stderr


def test_the_loop_of_the_documentation_sends_every_kind_after_those_that_it_needs():
    text = (FOLDER.parent / "cluster.md").read_text(encoding="utf-8")
    (kinds,) = re.findall(r"^for kind in (.*); do$", text, re.MULTILINE)
    assert kinds.split() == list(KINDS), "the order in which kinds are planned"


def test_a_batch_file_without_its_words_says_how_to_send_it():
    for path in BATCHES:
        ran = subprocess.run(["bash", str(path)], capture_output=True, text=True, check=False)
        assert ran.returncode != 0
        assert f"usage: sbatch {path.name} RECIPE OUT" in ran.stderr
