"""The scripts for Cloud TPU slices and Slurm, against stand-ins for gcloud and for the workers."""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent
HERE = pathlib.Path(__file__).parent
WHERE = ["--name=ldm", "--zone=us-west4-a"]
READY = {"queue": ["ACTIVE"], "node": ["READY"]}
TRAIN = ["python", "-m", "latent_diffusion_jax.train", "--workdir=/mnt/shared/runs/a"]
HOSTILE = [
    "--config.sample.prompts=('a cat', 'a dog; rm -rf $HOME')",
    'it\'s "quoted" `id` $(id) \\ \\\\ \\n',
    "two\nlines\tand a tab",
    "",
    " * ? [a-z] ~ {a,b} !! & | < > # %h %% é 猫",
    "--",
    "-n",
]
# Programs of a worker that the tests must not really run, and of a cluster.
FAKES = {
    "sudo": 'exec "${@//\\/etc\\//$HOME/etc/}"',
    "systemctl": """
unit=$HOME/etc/systemd/system/ldm_run.service
case $1 in
  cat) test -e "$unit" ;;
  disable) pid=$(cat "$HOME/service.pid") && kill -TERM "$pid"  # KillMode=mixed
    while kill -0 "$pid" 2>/dev/null; do sleep 0.02; done ;;
  enable) line=$(sed -n 's/^ExecStart=//p' "$unit")
    setsid ${line/supervise.sh/supervise.sh --pause=0.02} </dev/null >/dev/null 2>&1 &
    echo $! >"$HOME/service.pid" ;;
esac""",
    "mountpoint": 'test -e "$HOME/mounted"',
    "mount": 'mkdir -p "$1" && touch "$HOME/mounted"',
    "umount": 'rm "$HOME/mounted"',
    "mv": 'case $* in *probe*) test ! -e "$FAKE_CLOUD/flat" || exit 1 ;; esac; exec /bin/mv "$@"',
    "apt-get": 'echo "$*" >>"$HOME/apt.txt"',
    "add-apt-repository": 'echo "$*" >>"$HOME/apt.txt"',
    "curl": 'echo "$*" >>"$HOME/curl.txt"',
    "python3": f'exec {sys.executable} -IS "$@"',
    "scontrol": 'echo "$*" >>"$FAKE_CLOUD/scontrol.txt"',
    "srun": '[ "$1" = --kill-on-bad-exit=0 ] && shift && exec "$@"',
}


class Cloud:
    """A cloud of slices, in a folder, and the scripts of a checkout."""

    def __init__(self, folder, checkout):
        self.folder, self.checkout = folder, checkout
        for name in ("bin", "tmp"):
            (folder / name).mkdir()
        self.env = {
            "PATH": f"{folder}/bin:{checkout}/bin:/usr/bin:/bin",
            "HOME": str(folder),
            "TMPDIR": str(folder / "tmp"),
            "FAKE_CLOUD": str(folder),
            "FAKE_PYTHON": f"{checkout}/bin/fake_python",
            "LC_ALL": "C.UTF-8",
        }

    def lives(self, *lives):
        (self.folder / "lives.json").write_text(json.dumps(lives))

    def ready(self, **life):
        """A slice that is there and set up."""
        self.lives(READY | life)
        self("create_tpu.sh", "--type=v5litepod-8")
        self("setup_tpu.sh")

    def __call__(self, script, *args, status=0, where=WHERE):
        """Runs a script of launch/; its output and what it says, checked for its status."""
        done = subprocess.run(
            ["bash", self.checkout / "launch" / script, *where, *args],
            cwd=self.folder,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == status, (done.returncode, done.stdout, done.stderr)
        return done

    def calls(self, *begin):
        """The calls of gcloud that begin with these words after `compute tpus`, without them."""
        file = self.folder / "calls.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        calls = [json.loads(line)[2:] for line in lines]
        return [call[len(begin) :] for call in calls if tuple(call[: len(begin)]) == begin]

    def home(self, worker=0):
        return self.folder / "home" / str(worker)

    def records(self, file, worker=0):
        path = self.home(worker) / file
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def wait_for(self, status, worker=0):
        """Waits until the run's status begins with this."""
        file, end = self.home(worker) / "ldm_run/status", time.monotonic() + 60
        while not (file.exists() and file.read_text().startswith(status)):
            assert time.monotonic() < end, (status, file.exists() and file.read_text())
            time.sleep(0.02)
        return file.read_text().strip()

    def wait_for_runs(self, number):
        end = time.monotonic() + 60
        while len(self.records("runs.jsonl")) < number:
            assert time.monotonic() < end, number
            time.sleep(0.02)


def write_program(path, text):
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A checkout with the scripts, and beside them in bin/ the stand-ins."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "launch", folder / "launch")
    shutil.copy(ROOT / "requirements.txt", folder)
    name = ["-c", "user.name=x", "-c", "user.email=x@x"]
    for args in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message=x"]):
        subprocess.run(["git", *name, *args], cwd=folder, check=True)
    (folder / "bin").mkdir()
    for name, text in FAKES.items():
        write_program(folder / "bin" / name, f"#!/usr/bin/env bash\n{text}\n")
    head = f"#!{sys.executable} -IS\n"
    write_program(folder / "bin/gcloud", head + (HERE / "fake_gcloud.py").read_text())
    write_program(folder / "bin/fake_python", head + (HERE / "fake_python.py").read_text())
    (folder / ".git/info/exclude").write_text("bin\n")
    return folder


@pytest.fixture
def cloud(tmp_path, checkout):
    cloud = Cloud(tmp_path, checkout)
    yield cloud
    for file in tmp_path.glob("home/*/service.pid"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(file.read_text()), signal.SIGKILL)


def test_create_waits_until_the_slice_is_there(cloud):
    states = ["WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    cloud.lives({"queue": states, "node": ["CREATING", "READY"]})
    done = cloud("create_tpu.sh", "--type=v5litepod-16", "--spot", "--interval=0.01",
                 "--project=my-project", "--create_flag=--network=mine")  # fmt: skip
    assert cloud.calls("queued-resources", "create") == [
        ["ldm", "--node-id=ldm", "--zone=us-west4-a", "--project=my-project",
         "--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", "--spot",
         "--network=mine"]
    ]  # fmt: skip
    assert len(cloud.calls("queued-resources", "describe")) == 6  # ABSENT, 3, ACTIVE twice
    assert "queued resource ldm: ACTIVE, node: READY" in done.stderr
    assert "+ gcloud compute tpus queued-resources create ldm --node-id=ldm" in done.stderr
    cloud("create_tpu.sh", "--type=v5litepod-16")  # again: nothing to do
    assert len(cloud.calls("queued-resources", "create")) == 1


@pytest.mark.parametrize("life, says", [
    ({"queue": ["PROVISIONING", "FAILED"], "node": ["ABSENT"]}, "FAILED. It will not become"),
    ({"queue": ["SUSPENDED"], "node": ["ABSENT"]}, "SUSPENDED. It will not become active"),
    ({"queue": ["ACTIVE"], "node": ["PREEMPTED"]}, "taken away: launch/delete_tpu.sh --name=ldm"),
    ({"queue": ["ACTIVE"], "node": ["ABSENT"]}, "node: ABSENT. It was taken away"),
])  # fmt: skip
def test_create_says_what_to_do_where_a_slice_will_not_come(cloud, life, says):
    cloud.lives(life)
    done = cloud("create_tpu.sh", "--type=v4-8", "--interval=0.01", status=1)
    assert says in done.stderr.splitlines()[-1]
    assert "launch/delete_tpu.sh --name=ldm --zone=us-west4-a" in done.stderr


def test_create_waits_no_longer_than_it_is_told(cloud):
    cloud.lives({"queue": ["WAITING_FOR_RESOURCES"], "node": ["ABSENT"]})
    done = cloud("create_tpu.sh", "--type=v6e-8", "--interval=0.1", "--wait=1", status=1)
    assert "WAITING_FOR_RESOURCES after 1 seconds. It stays in the queue" in done.stderr


def test_what_gcloud_cannot_do_is_not_taken_for_a_slice_that_is_not_there(cloud):
    (cloud.folder / "offline").touch()
    for script, args in (("create_tpu.sh", ["--type=v6e-8"]), ("delete_tpu.sh", [])):
        assert "problem refreshing" in cloud(script, *args, status=1).stderr
    assert not cloud.calls("queued-resources", "create")
    assert not cloud.calls("queued-resources", "delete")


@pytest.mark.parametrize("script, args, says", [
    ("create_tpu.sh", ["--type=v6e-8", "--sopt"], "unknown option --sopt; known are: --name"),
    ("create_tpu.sh", ["--type=v6e-8", "spot"], "unexpected argument 'spot'"),
    ("create_tpu.sh", ["--type=v6e-8", "--spot=1"], "--spot takes no value"),
    ("create_tpu.sh", ["--type"], "--type needs a value"),
    ("create_tpu.sh", [], "--type is needed"),
    ("create_tpu.sh", ["--type=h100-8"], "no default --version for --type=h100-8"),
    ("create_tpu.sh", ["--type=v6e-8", "--name=a;b"], "--name='a;b' is not lower-case letters"),
    ("create_tpu.sh", ["--type=v6e-8", "--zone=us west"], "--zone='us west' is not a zone"),
    ("setup_tpu.sh", ["--mount=my bucket"], "--mount='my bucket' is not gs://BUCKET"),
    ("setup_tpu.sh", ["--mount=gs://b;id"], "--mount='gs://b;id' is not gs://BUCKET"),
    ("run_tpu.sh", [], "which command?"),
    ("run_tpu.sh", ["--", "python", "--workdir=gs://b/a"], "a workdir is a folder. Mount the"),
    ("run_tpu.sh", ["--", "python", "--workdir", "gs://b/a"], "a workdir is a folder. Mount the"),
    ("watch_tpu.sh", ["--keep", "--type=v6e-8"], "which command?"),
    ("watch_tpu.sh", ["--worker=x"], "--worker='x' is not a worker's number"),
    ("fetch_tpu.sh", ["--out=here"], "--workdir is needed"),
    ("delete_tpu.sh", ["--force"], "unknown option --force"),
])  # fmt: skip
def test_a_wrong_argument_is_one_clear_error(cloud, script, args, says):
    done = cloud(script, *args, status=2)
    assert says in done.stderr and done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1 and not cloud.calls()


def test_help_is_the_comment_at_the_top(cloud):
    text = cloud("create_tpu.sh", "--help").stdout
    assert "--wait=86400" in text and "--dry_run " in text and "set -e" not in text


def test_dry_run_runs_nothing_and_what_it_prints_does_what_a_run_does(cloud):
    keep = ["--keep", "--type=v5litepod-8", "--spot", "--mount=gs://my-bucket", "--dry_run", "--"]
    scripts = [
        ("create_tpu.sh", ["--type=v5p-8", "--dry_run"]),
        ("setup_tpu.sh", ["--mount=10.0.0.2:/share", "--dry_run"]),
        ("run_tpu.sh", ["--dry_run", "--", *TRAIN, *HOSTILE]),
        ("run_tpu.sh", ["--dry_run", "--stop"]),
        ("watch_tpu.sh", ["--dry_run"]),
        ("watch_tpu.sh", [*keep, *TRAIN, *HOSTILE]),
        ("fetch_tpu.sh", ["--dry_run", "--workdir=/mnt/shared/a b", "--out=c d"]),
        ("delete_tpu.sh", ["--dry_run"]),
    ]
    printed = {i: cloud(*scripts[i][:1], *scripts[i][1]).stdout for i in range(len(scripts))}
    assert not cloud.calls() and not list((cloud.folder / "tmp").glob("*.tar.gz"))
    assert all(line.split()[0] in ("gcloud", "git", "mkdir")
               for text in printed.values() for line in text.splitlines())  # fmt: skip

    cloud.ready()
    (cloud.folder / "calls.jsonl").unlink()
    cloud("run_tpu.sh", "--", *TRAIN, *HOSTILE)
    subprocess.run(["bash", "-euc", printed[2]], env=cloud.env, cwd=cloud.folder, check=True)
    really, pasted = cloud.calls("tpu-vm", "ssh")
    assert really == pasted


def test_hostile_arguments_arrive_unchanged_on_all_workers(cloud):
    cloud.ready(workers=2)
    cloud("run_tpu.sh", "--", *TRAIN, *HOSTILE)
    for worker in (0, 1):
        cloud.wait_for("finished", worker)
        (run,) = cloud.records("runs.jsonl", worker)
        assert run["argv"] == [*TRAIN[1:], *HOSTILE]
        assert run["cwd"] == str(cloud.home(worker) / "latent_diffusion_jax")


def test_setup_copies_the_commit_and_installs_and_mounts(cloud):
    cloud.lives(READY | {"workers": 2})
    cloud("create_tpu.sh", "--type=v5litepod-16")
    assert "warning" not in cloud("setup_tpu.sh", "--dry_run").stderr
    (cloud.checkout / "launch/new.sh").touch()
    done = cloud("setup_tpu.sh", "--mount=gs://my-bucket/some/folder")
    (cloud.checkout / "launch/new.sh").unlink()
    assert "warning: changes that are not committed stay here" in done.stderr
    shared = cloud.folder / "shared"
    for worker in (0, 1):
        code = cloud.home(worker) / "latent_diffusion_jax"
        assert (code / "launch/run_tpu.sh").exists() and not (code / "launch/new.sh").exists()
        ours, theirs = (code / "requirements-tpu.txt", code / "requirements.txt")
        changed = set(ours.read_text().split("\n")) - set(theirs.read_text().split("\n"))
        assert [line.split(">=")[0] for line in changed] == ["jax[tpu]"]
        assert ["install", "--quiet", "-r", "requirements-tpu.txt"] in cloud.records(
            "pip.jsonl", worker
        )
        root, line = (cloud.home(worker) / "etc/fstab").read_text().splitlines()
        bucket, folder, kind, options, *_ = line.split()
        assert (bucket, folder, kind) == ("my-bucket", str(shared), "gcsfuse")
        assert "only_dir=some/folder" in options and "metadata_cache_ttl_secs=0" in options
        assert root.startswith("/dev/root") and not any(shared.iterdir())
    cloud("setup_tpu.sh", "--mount=10.0.0.2:/share")  # another one takes its place
    line = (cloud.home() / "etc/fstab").read_text().splitlines()[1:]
    assert line == [f"10.0.0.2:/share {shared} nfs rw,_netdev,hard 0 0"]
    assert len(cloud.records("pip.jsonl")) == 3  # a look for pip at each call, one installation


def test_setup_refuses_a_bucket_that_cannot_rename_folders(cloud):
    cloud.lives(READY)
    cloud("create_tpu.sh", "--type=v5litepod-8")
    (cloud.folder / "flat").touch()
    done = cloud("setup_tpu.sh", "--mount=gs://my-bucket", status=1)
    assert "--enable-hierarchical-namespace" in done.stderr


def test_a_run_starts_again_after_failures_until_it_is_done(cloud):
    cloud.ready(statuses=[1, 134, 0])
    cloud("run_tpu.sh", "--", *TRAIN)
    assert cloud.wait_for("finished") == "finished"
    assert len(cloud.records("runs.jsonl")) == 3
    log = (cloud.home() / "ldm_run/train.log").read_text()
    assert "status 1, start 1 of 20 in 0.02 s" in log and "status 134, start 2 of 20 in 0.04" in log
    unit = (cloud.home() / "etc/systemd/system/ldm_run.service").read_text()
    assert "WantedBy=multi-user.target" in unit and "KillMode=mixed" in unit


def test_a_run_ends_at_a_user_error(cloud):
    cloud.ready(statuses=[2])
    cloud("run_tpu.sh", "--", *TRAIN)
    assert cloud.wait_for("failed").startswith("failed: status 2")
    time.sleep(0.1)
    assert len(cloud.records("runs.jsonl")) == 1


def test_a_run_is_stopped_with_one_signal_and_replaced(cloud):
    cloud.ready(statuses=["wait"])
    cloud("run_tpu.sh", "--", *TRAIN)
    cloud.wait_for("running")
    cloud.wait_for_runs(1)
    cloud("run_tpu.sh", "--", *TRAIN, "--another")
    cloud.wait_for("running")
    cloud.wait_for_runs(2)
    cloud("run_tpu.sh", "--stop")
    assert cloud.wait_for("stopped") == "stopped: status 143"
    assert cloud.records("signals.jsonl") == [1, 1]
    assert [run["argv"][-1] for run in cloud.records("runs.jsonl")] == [TRAIN[-1], "--another"]


def test_supervise_gives_up_after_as_many_failures_as_it_is_told(cloud):
    script = cloud.checkout / "launch/supervise.sh"
    done = subprocess.run(
        [
            "bash",
            script,
            "--pause=0.01",
            "--max_restarts=2",
            "--",
            "bash",
            "-c",
            "echo run; exit 7",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 7 and done.stdout.count("run\n") == 3
    assert "failed: status 7 after 2 new starts" in done.stdout


def test_supervise_passes_a_signal_on_once(cloud):
    (cloud.folder / "statuses").write_text("wait")
    script, python = cloud.checkout / "launch/supervise.sh", cloud.checkout / "bin/fake_python"
    run = subprocess.Popen(["bash", script, "--log=log", "--", python], cwd=cloud.folder,
                           env=cloud.env)  # fmt: skip
    cloud.home = lambda worker=0: cloud.folder
    cloud.wait_for_runs(1)
    run.send_signal(signal.SIGTERM)
    time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    assert run.wait(60) == 0 and cloud.records("signals.jsonl") == [1]


def test_a_run_does_not_start_beside_a_mount_that_is_gone(cloud):
    cloud.lives(READY | {"statuses": ["wait"]})
    cloud("create_tpu.sh", "--type=v5litepod-8")
    cloud("setup_tpu.sh", "--mount=gs://my-bucket")
    (cloud.home() / "mounted").unlink()
    write_program(cloud.folder / "bin/mount", "#!/usr/bin/env bash\nexit 32\n")
    cloud("run_tpu.sh", "--", *TRAIN)
    cloud.wait_for("restarting: status 1")
    assert not cloud.records("runs.jsonl")
    write_program(cloud.folder / "bin/mount", '#!/usr/bin/env bash\ntouch "$HOME/mounted"\n')
    cloud.wait_for_runs(1)


def test_watch_shows_the_states_and_a_log(cloud):
    cloud.ready(workers=2)
    cloud("run_tpu.sh", "--", *TRAIN)
    cloud.wait_for("finished", worker=1)
    done = cloud("watch_tpu.sh", "--worker=1", "--lines=1")
    assert "queued resource ldm: ACTIVE" in done.stderr and "node ldm: READY" in done.stderr
    status, line = done.stdout.splitlines()
    assert status == "finished" and line.endswith("supervise: finished")
    cloud("delete_tpu.sh")
    assert "queued resource ldm: ABSENT" in cloud("watch_tpu.sh").stderr


def test_keep_takes_a_run_through_a_preemption_to_its_end(cloud):
    first = {"queue": ["PROVISIONING", *["ACTIVE"] * 5, "SUSPENDING", "SUSPENDED"],
             "node": ["READY"] * 5 + ["ABSENT"], "statuses": ["wait"], "workers": 2}  # fmt: skip
    failed = {"queue": ["FAILED"], "node": ["ABSENT"]}
    second = {"queue": ["ACTIVE"], "node": ["READY"] * 3 + ["PREEMPTED"], "statuses": ["wait"]}
    cloud.lives(first, failed, second, READY | {"statuses": [1, 0], "workers": 2})
    done = cloud("watch_tpu.sh", "--keep", "--type=v5litepod-16", "--spot", "--interval=0.05",
                 "--mount=gs://my-bucket", "--delete_at_end", "--", *TRAIN, *HOSTILE)  # fmt: skip
    assert len(cloud.calls("queued-resources", "create")) == 4
    assert len(cloud.calls("queued-resources", "delete")) == 4
    assert all("--spot" in call for call in cloud.calls("queued-resources", "create"))
    places = [done.stderr.index(text) for text in ("run: running", "SUSPENDED", "FAILED",
              "PREEMPTED; starting anew", "the run is finished")]  # fmt: skip
    assert places == sorted(places) and done.stderr.endswith("ldm is deleted\n")
    for worker in (0, 1):
        runs = cloud.records("runs.jsonl", worker)
        assert [run["argv"] for run in runs] == [[*TRAIN[1:], *HOSTILE]] * 2
        assert (cloud.home(worker) / "ldm_run/mount").read_text() == "gs://my-bucket\n"


def test_keep_ends_where_the_run_has_failed_for_good(cloud):
    cloud.lives(READY | {"statuses": [2]})
    done = cloud("watch_tpu.sh", "--keep", "--type=v5litepod-8", "--interval=0.05", "--", *TRAIN,
                 status=1)  # fmt: skip
    assert "failed for good" in done.stderr and "costing until" in done.stderr
    assert not cloud.calls("queued-resources", "delete")


def test_keep_ends_where_somebody_has_stopped_the_run(cloud):
    cloud.ready(statuses=["wait"])
    cloud("run_tpu.sh", "--", *TRAIN)
    cloud.wait_for_runs(1)
    cloud("run_tpu.sh", "--stop")
    cloud.wait_for("stopped")
    done = cloud("watch_tpu.sh", "--keep", "--type=v5litepod-8", "--interval=0.05", "--", *TRAIN,
                 status=1)  # fmt: skip
    assert "somebody has stopped the run" in done.stderr and "costing until" in done.stderr


def test_keep_gives_up_where_no_slice_can_be_made(cloud):
    cloud.lives()  # the cloud has none
    done = cloud("watch_tpu.sh", "--keep", "--type=v5litepod-8", "--interval=0.01", "--", *TRAIN,
                 status=1)  # fmt: skip
    assert "six failures in a row, the last in: create" in done.stderr


@pytest.mark.parametrize("what, files", [
    ("logs", {"config.json", "metrics.jsonl", "tensorboard/events", "train.log"}),
    ("all", {"config.json", "diffusion/5/state", "metrics.jsonl", "tensorboard/events",
             "train.log"}),
])  # fmt: skip
def test_fetch_copies_logs_or_everything(cloud, what, files):
    cloud.ready()
    cloud("run_tpu.sh", "--", *TRAIN)
    cloud.wait_for("finished")
    workdir = cloud.folder / "the runs/a"
    for file in files - {"train.log"} | {"diffusion/5/state"}:
        (workdir / file).parent.mkdir(parents=True, exist_ok=True)
        (workdir / file).touch()
    cloud("fetch_tpu.sh", f"--workdir={workdir}", "--out=my copy", f"--what={what}")
    copy = cloud.folder / "my copy"
    assert {str(p.relative_to(copy)) for p in copy.rglob("*") if p.is_file()} == files


def test_delete_says_what_it_deletes(cloud):
    cloud.ready()
    done = cloud("delete_tpu.sh")
    assert "deleting ldm in us-west4-a: queued resource ACTIVE, node READY" in done.stderr
    assert cloud.calls("queued-resources", "delete") == [
        ["ldm", "--zone=us-west4-a", "--force", "--quiet"]
    ]
    cloud("delete_tpu.sh")  # there is nothing left
    cloud.lives({"queue": ["ABSENT"], "node": ["READY"]})  # a node alone costs as much
    subprocess.run([cloud.checkout / "bin/gcloud", "compute", "tpus", "queued-resources", "create"],
                   env=cloud.env, check=True)  # fmt: skip
    cloud("delete_tpu.sh")
    assert len(cloud.calls("queued-resources", "delete")) == 1
    assert len(cloud.calls("tpu-vm", "delete")) == 1


@pytest.mark.parametrize("train_status, restarts, requeued", [
    (0, 0, False), (143, 50, True), (2, 0, False), (1, 3, True), (1, 20, False)
])  # fmt: skip
def test_slurm_queues_again_what_was_stopped_or_has_crashed(
    cloud, train_status, restarts, requeued
):
    bin_folder = cloud.folder / ".venv/bin"
    bin_folder.mkdir(parents=True)
    shutil.copy(cloud.checkout / "bin/fake_python", bin_folder / "python")
    (cloud.folder / "statuses").write_text(str(train_status))
    cloud.env |= {"SLURM_SUBMIT_DIR": str(cloud.folder), "SLURM_JOB_ID": "123456",
                  "SLURM_RESTART_COUNT": str(restarts)}  # fmt: skip
    cloud("slurm.sbatch", *TRAIN[3:], *HOSTILE, where=[], status=train_status)
    (run,) = [json.loads(line) for line in (cloud.folder / "runs.jsonl").open()]
    assert run["argv"] == [*TRAIN[1:], *HOSTILE]
    asked = cloud.folder / "scontrol.txt"
    assert asked.exists() == requeued
    assert not requeued or asked.read_text() == "requeue 123456\n"


def test_shellcheck_finds_nothing():
    shellcheck = pathlib.Path(sys.executable).parent / "shellcheck"
    files = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "launch").glob("*.s*"))
    assert "launch/slurm.sbatch" in files and len(files) > 10
    done = subprocess.run([shellcheck, "-x", *files], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
