"""How a run ends: its exit status, and one line about what went wrong.

0      done
1      an error that the user can correct: one line on stderr
2      a mistake in the flags (options.py)
130    stopped by a signal or by the loss of another process: a message that says how to resume
"""

import sys
from collections.abc import Callable

from training import distributed
from training.options import Options
from training.report import command
from training.state import saved_states


def exit_status(run: Callable[[], None], args: Options, argv: list[str] | None) -> int:
    """Call `run` and return the exit status.

    argv: the words of the command line; None for those of sys.argv.
    """
    try:
        run()
    except (ValueError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, RuntimeError) as error:
        lost = distributed.describe_lost_process(error)
        if isinstance(error, RuntimeError) and not lost:
            raise
        if lost or distributed.is_main():
            print(f"\n{lost or 'stopped'}{how_to_resume(args, argv)}", file=sys.stderr)
        return 130
    return 0


def how_to_resume(args: Options, argv: list[str] | None) -> str:
    """The command that continues a stopped run."""
    if args.overwrite or not saved_states(args.output_dir):  # or only those of the earlier run
        return " before anything was saved"
    given = sys.argv[1:] if argv is None else argv
    words = [word for word in given if word not in ("--resume", "--overwrite")]
    again = command([*words, "--resume"], distributed.local_world_size())
    return f"; resume with\n  {again}"
