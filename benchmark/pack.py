"""Pack the results of a sweep's runs into one small table, which sweep.py and report.py accept in their place.

    python benchmark/pack.py results/sweep             # writes results/sweep/packed.csv.gz
    python benchmark/pack.py results/sweep --remove    # and removes what the packed runs left in their folders

Each run keeps its settings, its script's hash and its curves of returns and collapse at 100 points: a few kilobytes.
Models, event files and videos are not packed.
"""

import fcntl
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from reading import PACKED, Damaged, read_packed, read_result, same_run, write_packed

# What a run, or evaluate.py, leaves in a run's folder
LEFT = ("run.json", "progress.csv", "events.out.tfevents.*", "model.pt", "checkpoint.pt", "checkpoints/*.pt")
LEFT += ("evaluation.json", "collapse.png", "collapse.gif", "videos/*.mp4", "videos/*.json", "*.tmp")


@dataclass
class Args:
    folder: Annotated[Path, tyro.conf.Positional]
    """the folder that benchmark.sh wrote to"""
    remove: bool = False
    """remove what the packed runs left in their folders; other files stay"""


def fail(message):
    sys.exit(f"error: {message}")


def remove(folder):
    """Remove what the run left; returns whether the folder is gone too."""
    for path in [path for pattern in LEFT for path in folder.glob(pattern)]:
        path.unlink()
    for path in (folder / "videos", folder / "checkpoints", folder):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
    return not folder.exists()


def main():
    args = tyro.cli(Args, description=__doc__.partition("\n\n")[0])
    folder = args.folder
    if not (folder / "runs").is_dir() and not (folder / PACKED).is_file():
        fail(f"{folder} holds no runs; give the folder that benchmark.sh wrote to")
    try:
        with ExitStack() as stack:
            study = folder.resolve().parent.parent / "study.lock"  # of whose stages this may be one
            for path in [folder / "sweep.lock", *([study] if study.is_file() else [])]:
                try:
                    fcntl.flock(stack.enter_context(open(path, "a")), fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    fail(f"{folder}: a sweep is writing there; wait for it")
            packed, fresh, left = read_packed(folder / PACKED), {}, []
            for path in sorted((folder / "runs").glob("*/run.json")):
                try:
                    fresh[path.parent.name] = read_result(path.parent)
                except Damaged as error:
                    left.append(str(error))
            for name in packed.keys() & fresh.keys():
                if not same_run(packed[name].record, fresh[name].record["args"], fresh[name].record["script_sha256"]):
                    fail(f"{folder / PACKED} holds another run of the name {name}; remove one of them")
            write_packed(folder / PACKED, (fresh | packed).values())  # what is packed stays as it is
            written = read_packed(folder / PACKED)  # before anything is removed
            kept = [name for name in fresh if args.remove and name in written and not remove(fresh[name].path)]
    except Damaged as error:
        fail(f"{error}; remove or restore it")
    except OSError as error:
        fail(f"{folder} cannot be written: {error}")
    size = (folder / PACKED).stat().st_size / 1000
    print(f"{len(written)} runs in {folder / PACKED}, {size:.0f} kB")
    for why in left:
        print(f"not packed: {why}")
    for name in kept:
        print(f"not removed: {folder / 'runs' / name} holds other files too")


if __name__ == "__main__":
    main()
