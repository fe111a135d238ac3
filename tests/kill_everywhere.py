"""Kill a run before each change of its files, resume it, and compare with the uninterrupted run.

python tests/kill_everywhere.py --every 3    # minutes; the tests take a few points

The parent imports everything once and forks a child per run. Needs POSIX.
"""

import argparse
import os
import shutil
import signal
import sys
import tempfile
import traceback
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}

import torch  # noqa: E402 (after the settings above)
from small_runs import KINDS, make_files, outcome, run  # noqa: E402

from training import loop  # noqa: E402

CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir")


def run_and_die(root, kind, out, at, *more):
    """Run in a child, killed before the `at`th change of a file; returns the number of changes."""
    log, count = out.parent / "log", out.parent / "count"
    count.write_bytes(b"")
    pid = os.fork()
    if pid:
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert status in (0, -signal.SIGKILL), log.read_text()
        return len(count.read_bytes())
    counter, changes = os.open(count, os.O_WRONLY), []

    def audit(event, given):
        is_write = event == "open" and isinstance(given[2], int) and given[2] & os.O_ACCMODE
        if (is_write or event in CHANGES) and str(given[0]).startswith(str(out)):
            changes.append(os.write(counter, b"."))
            if len(changes) == at:
                os.kill(os.getpid(), signal.SIGKILL)

    try:
        with open(log, "w", buffering=1) as sys.stdout:
            sys.stderr = sys.stdout
            sys.addaudithook(audit)
            run(root, kind, out, *more)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=1, help="kill at each n-th change only")
    parser.add_argument("--first", type=int, default=1, help="the first of these changes")
    parser.add_argument("--only", choices=KINDS, nargs="+", default=KINDS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    loop.LOG_STEPS, loop.SAVE_SECONDS = 1, 0  # a resume state after every step
    failures = 0
    with tempfile.TemporaryDirectory() as name:
        root = make_files(Path(name).resolve())
        for kind in options.only:
            changes = run_and_die(root, kind, root / f"{kind}-whole", 0)
            whole = outcome(root / f"{kind}-whole")
            points = range(options.first, changes + 1, options.every)
            for at in points:
                shutil.rmtree(root / "cut", ignore_errors=True)
                assert run_and_die(root, kind, root / "cut", at) == at
                run_and_die(root, kind, root / "cut", 0, "--resume")
                same = outcome(root / "cut") == whole
                failures += not same
                if not same:
                    print(f"{kind}, killed at change {at}: another outcome")
            counts = f"{len(points)} kills at {changes} changes of files, {failures} failures"
            print(f"{kind}: {counts}", flush=True)
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
