"""Entry point of the `rmoe` command: finds the verb, parses its arguments, and turns errors into one line.

Nothing here imports torch; a verb's module is imported only when that verb is asked for, so `rmoe --help` and
`rmoe zoo` answer at once.

To add a verb: write `rmoe/cli/<verb>.py` with a typed function `run(...)` (its docstring is the help text, its
return value the exit status, None meaning 0) and add one line to `VERBS`. `tyro.conf.Positional[Path]` makes a
parameter positional; a parameter `config: Annotated[RunConfig, tyro.conf.arg(name="")]` gives the verb all options
of a run and `--preset NAME`.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from io import TextIOWrapper

from rmoe import __version__
from rmoe.errors import RequestError, RunError, Stopped, one_line

# verb -> what it does, in the order of `rmoe --help`.
VERBS = {
    "zoo": "list every named router: stages, source, what it carries",
    "train": "train one model",
    "probe": "what routers can do, on tasks with a known optimum, in minutes",
    "compare": "train several routers on the same data and compare them with statistics",
    "analyze": "measure the routing of a model, ours or any Hugging Face MoE",
    "trace": "write down which experts a model sends each token to",
    "graft": "put a recurrent router onto a pretrained MoE without changing its function",
    "families": "which MoE model types can be read and grafted, as tried on tiny models",
    "finetune": "instruction tuning or classification, with the router frozen or not",
    "eval": "bits per byte, perplexity, benchmark tasks",
    "generate": "continue a text",
    "serve": "an OpenAI-compatible endpoint",
    "plan": "parameters, memory, FLOPs and traffic of a model on a cluster, on paper",
    "runs": "list runs with their state, last loss, rate and time left",
}


def usage() -> str:
    """Help text of `rmoe` itself."""
    width = max(map(len, VERBS))
    lines = [f"  {verb:<{width}}  {summary}" for verb, summary in VERBS.items()]
    return "\n".join(
        [
            "usage: rmoe VERB [OPTIONS]",
            "",
            "Mixture-of-Experts language models whose router has a memory across layers.",
            "",
            "verbs:",
            *lines,
            "",
            "`rmoe VERB --help` lists a verb's options; `rmoe --version` prints the version.",
            "Exit status: 0 done, 1 the run failed, 2 the request is wrong. RMOE_DEBUG=1 shows tracebacks.",
        ]
    )


def dispatch(argv: Sequence[str]) -> int:
    """Carry out one command line; errors pass through as exceptions.

    Args:
        argv: arguments after the program's name.

    Returns:
        The exit status.

    Raises:
        RequestError: on an unknown verb or option, or a value that is not allowed.
        RunError: when the verb's work failed.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    if argv[0] == "--version":
        print(f"rmoe {__version__}")
        return 0
    verb, *rest = argv
    if verb not in VERBS:
        raise RequestError("verb", verb, ", ".join(VERBS))
    module = import_module(f"rmoe.cli.{verb}")

    from rmoe.cli.arguments import parse  # tyro: 0.2 s that `rmoe --help` need not pay

    call = parse(module.run, rest, prog=f"rmoe {verb}")
    status: int | None = call() if call else None
    return status or 0


def _never_fail_at_a_character() -> None:
    """A terminal that lacks a sign shows `?` in its place: what was computed must not end as a failure."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `rmoe`; see `usage`. Returns the exit status and never raises for a user's mistake.

    Args:
        argv: arguments after the program's name; default `sys.argv[1:]`.
    """
    debug = os.environ.get("RMOE_DEBUG") == "1"
    _never_fail_at_a_character()
    try:
        status = dispatch(sys.argv[1:] if argv is None else argv)
        if sys.stdout is not None:
            sys.stdout.flush()  # inside the try: a closed pipe shows itself here
        return status
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return 0
    except (RequestError, RunError) as error:
        if debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (`| head`) has gone. Keep the interpreter's last flush from complaining about it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            traceback.print_exc()
        said = one_line(f"{type(error).__name__}: {error}")
        hint = "" if debug else " (RMOE_DEBUG=1 shows the traceback)"
        print(f"error: {said}{hint}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
