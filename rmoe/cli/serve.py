"""`rmoe serve`: an OpenAI-compatible endpoint for one model."""

from __future__ import annotations

import errno
import sys

from rmoe.cli.models import Model, Plugins
from rmoe.errors import RequestError
from rmoe.validation import require

SECONDS_TO_FINISH = 5  # for the requests at work when the server is told to end; then they are given up
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def run(
    model: Model,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    max_length: int | None = None,
    concurrent: int = 4,
    waiting: int = 64,
    device: str = "auto",
    plugin: Plugins = (),
) -> None:
    """Serve /v1/completions, /v1/chat/completions, /v1/models and /health; needs `pip install "rmoe[serve]"`.

    Requests are computed one at a time; a closed connection stops its request and frees its slot.

    Args:
        host: where to listen. There is no authentication: anything but loopback is open to whoever can reach it.
        port: 0 takes a free one and says which.
        name: what clients call the model; default its folder's name.
        max_length: tokens of prompt and answer together; default what the model was configured for.
        concurrent: requests that may hold a slot.
        waiting: requests that may wait for one; more are answered with 429.
        device: cpu, cuda, or auto.
    """
    require(0 <= port <= 65_535, "--port", port, "0 to 65535")
    require(max_length is None or max_length >= 2, "--max-length", max_length, "2 or more")
    require(concurrent >= 1, "--concurrent", concurrent, "1 or more")
    require(waiting >= 0, "--waiting", waiting, "0 or more")

    from rmoe.analysis.command import device_of
    from rmoe.cli.models import open_model
    from rmoe.places import display_name

    try:
        import uvicorn

        from rmoe.serving.limits import Limits
        from rmoe.serving.server import build_app
    except ImportError as error:
        raise RequestError("rmoe serve", str(error), 'installed with pip install "rmoe[serve]"') from error
    on = device_of(None if device == "auto" else device)
    served, tokenizer, folder = open_model(model, plugin, str(on))
    name = name or display_name(folder)
    longest = getattr(served.config.get_text_config(), "max_position_embeddings", 4096)
    limits = Limits(max_length=max_length or longest, concurrent=concurrent, waiting=waiting)
    app = build_app(served, tokenizer, name, limits)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_level="warning",
        timeout_keep_alive=5,
        timeout_graceful_shutdown=SECONDS_TO_FINISH,
        access_log=False,
    )
    server = uvicorn.Server(config)
    try:
        listening = config.bind_socket()
    except SystemExit as stop:  # uvicorn's way to say that it cannot listen there
        why = stop.__context__
        if isinstance(why, OSError) and why.errno in (errno.EADDRINUSE, errno.EACCES):
            raise RequestError("--port", port, f"a free port of {host}") from stop
        raise RequestError("--host", host, f"an address of this machine ({why})") from stop
    with listening:
        listening.listen(config.backlog)  # before anybody is told that it serves
        if host not in LOOPBACK:
            print(f"warning: listening on {host} without authentication", file=sys.stderr, flush=True)
        address = f"[{host}]" if ":" in host else host  # IPv6
        where = f"http://{address}:{listening.getsockname()[1]}"
        print(f"serving {name} at {where}/v1", file=sys.stderr, flush=True)
        server.run(sockets=[listening])
