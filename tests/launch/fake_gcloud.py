"""A stand-in for gcloud: records its arguments, plays slices, runs ssh commands in folders here.

FAKE_CLOUD is a folder with
  calls.jsonl   the arguments of every call
  lives.json    what each created slice goes through, the next one first: {"queue": [...] and
                "node": [...]: states, one for each time that somebody asks, the last one for ever;
                "statuses": how its train commands end, see fake_python.py}
  life.json     the slice that is there; no such file: none
  home/0 ...    the home folders of its workers
"""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

# What `gcloud --help` lists (528.0.0), of that which is used here.
FLAGS = {
    ("queued-resources", "create"): "node-id accelerator-type runtime-version spot network",
    ("queued-resources", "describe"): "format",
    ("queued-resources", "delete"): "force quiet",
    ("tpu-vm", "describe"): "format",
    ("tpu-vm", "delete"): "quiet",
    ("tpu-vm", "ssh"): "worker command ssh-flag",
    ("tpu-vm", "scp"): "worker recurse",
}
WITHOUT_VALUE = {"spot", "force", "quiet", "recurse"}

cloud = pathlib.Path(os.environ["FAKE_CLOUD"])
life_file = cloud / "life.json"


def main() -> int:
    with (cloud / "calls.jsonl").open("a") as calls:
        calls.write(json.dumps(sys.argv[1:]) + "\n")
    assert sys.argv[1:3] == ["compute", "tpus"], sys.argv
    kind, verb, *rest = sys.argv[3:]
    flags, words = {}, []
    for arg in rest:
        key, _, value = arg.removeprefix("--").partition("=")
        if not arg.startswith("--"):
            words.append(arg)
        elif key not in [*FLAGS[kind, verb].split(), "zone", "project"]:
            return error(f"unrecognized arguments: {arg}")
        elif (key in WITHOUT_VALUE) == bool(value):
            return error(f"argument --{key}: with or without a value?")
        else:
            flags[key] = value
    if (cloud / "offline").exists():
        return error("there was a problem refreshing your current auth tokens")
    if verb == "create":
        if life_file.exists():
            return error("ALREADY_EXISTS")
        return create()
    if not life_file.exists():
        return error(f"NOT_FOUND: Resource '{words[0]}' was not found")
    life = json.loads(life_file.read_text())
    if verb == "describe":
        states = life["queue" if kind == "queued-resources" else "node"]
        if states[0] == "ABSENT":
            return error("NOT_FOUND: it was not found")
        print(states.pop(0) if len(states) > 1 else states[0])
        life_file.write_text(json.dumps(life))
        return 0
    if verb == "delete":
        end_services()
        life_file.unlink()
        return 0
    homes = sorted((cloud / "home").iterdir())
    chosen = homes if flags.get("worker") == "all" else [homes[int(flags.get("worker", 0))]]
    if verb == "scp":
        for home in chosen:
            shutil.copy(words[0], home / words[1].split(":")[1])
        return 0
    return max(ssh(home, flags["command"]) for home in chosen)


def error(message: str) -> int:
    print(f"ERROR: (gcloud.{'.'.join(sys.argv[1:5])}) {message}", file=sys.stderr)
    return 1


def create() -> int:
    """The next life, on VMs with nothing on their disks but an environment of fakes."""
    lives = json.loads((cloud / "lives.json").read_text())
    if not lives:
        return error("RESOURCE_EXHAUSTED: Quota limit has been exceeded")
    life_file.write_text(json.dumps(lives.pop(0)))
    (cloud / "lives.json").write_text(json.dumps(lives))
    shutil.rmtree(cloud / "home", ignore_errors=True)
    life = json.loads(life_file.read_text())
    for i in range(life.get("workers", 1)):
        home = cloud / "home" / str(i)
        (home / "etc/systemd/system").mkdir(parents=True)
        (home / "etc/fstab").write_text("/dev/root / ext4 defaults 0 1\n")
        (home / "statuses").write_text("\n".join(map(str, life.get("statuses", [0]))))
        (home / "latent_diffusion_jax/.venv/bin").mkdir(parents=True)
        shutil.copy(os.environ["FAKE_PYTHON"], home / "latent_diffusion_jax/.venv/bin/python")
    return 0


def ssh(home: pathlib.Path, command: str) -> int:
    env = os.environ | {"HOME": str(home), "LDM_SHARED": str(cloud / "shared")}
    return subprocess.run(["bash", "-c", command], cwd=home, env=env).returncode


def end_services() -> None:
    for pid in (cloud / "home").glob("*/service.pid"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(pid.read_text()), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
