"""Serve a trained run: a web page and an API that predict the class of a note.

Without options: the bundled adapter, at http://127.0.0.1:7860.

Examples:
{command} --run runs/demo --port 8000
{command} --run runs/five --adapter dental=runs/dental --adapter eye=runs/eye
{command} --host 0.0.0.0 --allow-host notes.example --auth-file passwords.txt
"""

import argparse
import ipaddress
import re
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clinora.commands import (
    STOPPED,
    add_machine_options,
    add_run_quantize_option,
    as_typed,
    check_run,
    new_parser,
    one_line_errors,
)
from clinora.serving.log import AccessLog
from clinora.serving.rate_limit import NOTES_PER_MINUTE, RateLimit

ADAPTER = re.compile(r"(?P<name>[A-Za-z0-9_.-]{1,64})=(?P<run>.+)")  # of --adapter
FLAGS = "flagged"  # folder in the working directory; the first flag creates it


def build_parser(prog: str = "clinora serve") -> argparse.ArgumentParser:
    """Define the options."""
    parser = new_parser(prog, __doc__.format(command=as_typed(prog, "serve")))
    add = parser.add_argument
    add("--run", default="bundled", help="folder of a trained run (default: %(default)s)")
    add(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=RUN",
        help='another run of the same base, which a request to the API chooses with "adapter": '
        "NAME; may be repeated (default: none)",
    )
    add("--base", help="the base model, if it has moved (default: the run's)")
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    add("--port", type=int, default=7860, help="0: any free port (default: %(default)s)")
    add(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="host name that browsers use for this machine; required beyond the loopback address; "
        "may be repeated (default: none)",
    )
    add(
        "--auth-file",
        help="password file: lines of python -m clinora.serving.passwords NAME (default: none)",
    )
    add(
        "--trusted-proxy",
        action="append",
        default=[],
        metavar="ADDRESS",
        help="proxy (address or network) whose X-Forwarded-For and X-Forwarded-Proto headers are "
        "trusted; may be repeated (default: none)",
    )
    add("--log", metavar="FILE", help="write an access log of JSON lines (default: none)")
    add(
        "--rate-limit",
        type=int,
        default=NOTES_PER_MINUTE,
        metavar="N",
        help="notes a minute that each user may send (default: %(default)s)",
    )
    add(
        "--live-lesson",
        action="store_true",
        help="offer the page's live lesson, which trains on this machine, although --auth-file is "
        "given; without --auth-file it is always offered (default: off)",
    )
    add_run_quantize_option(parser)
    add_machine_options(parser)
    return parser


def main(argv: list[str] | None = None, prog: str = "clinora serve") -> int:
    """Serve until Ctrl-C or SIGTERM, and return the exit status."""
    with one_line_errors(prog):
        args = build_parser(prog).parse_args(argv)
        sys.stdout.reconfigure(errors="replace")  # a redirect on Windows is not UTF-8
        # uvicorn raises the signal again when it has answered the accepted requests.
        signal.signal(signal.SIGINT, lambda *_: sys.exit(STOPPED))
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        serve_run(args, prog)
    return 0


def serve_run(args: argparse.Namespace, prog: str) -> None:
    """Open the port and the log, load the run and serve it."""
    check_addresses(args)
    runs = read_adapters(args.adapter)
    rate_limit = RateLimit(args.rate_limit)
    with take_port(args.host, args.port) as listener:
        for run in (args.run, *runs.values()):
            check_run(run, prog)
        with open_log(args.log) as log:
            load_and_serve(args, listener, runs, rate_limit, log)


@contextmanager
def open_log(path: str | None) -> Iterator[AccessLog | None]:
    """Open the access log, if there is one, and close it at the end.

    Raises:
        ValueError: The file cannot be opened.
    """
    if path is None:
        yield None
        return
    try:
        log = AccessLog(path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(f"--log {path} ({reason}): expected a file that can be written") from None
    try:
        yield log
    finally:
        log.close()


def load_and_serve(
    args: argparse.Namespace,
    listener: socket.socket,
    runs: dict[str, str],
    rate_limit: RateLimit,
    log: AccessLog | None,
) -> None:
    """Load the runs and serve them on a listening socket; ``runs`` are those of the adapters."""
    from clinora.classifier import Classifier
    from clinora.device import keep_freed_memory
    from clinora.serving.app import create_app, serve
    from clinora.serving.card import model_card
    from clinora.serving.passwords import read_passwords
    from clinora.serving.words import read_examples

    keep_freed_memory()
    users = None
    if args.auth_file is not None:
        users = read_passwords(args.auth_file)
    examples = read_examples(args.run)
    classifier, *others = Classifier.load_several(
        [args.run, *runs.values()],
        base=args.base,
        device=args.device,
        precision=args.precision,
        quantize=args.quantize,
    )
    if is_loopback(args.host):
        hosts = [*args.allow_host, args.host]
        name = args.host
    else:
        hosts = args.allow_host
        name = hosts[0]
    _, port = listener.getsockname()
    url = f"http://{name}:{port}"
    app = create_app(
        classifier,
        FLAGS,
        adapters=dict(zip(runs, others, strict=True)),
        hosts=hosts,
        users=users,
        card=model_card(classifier, args.run),
        examples=examples,
        url=url,
        trusted_proxies=args.trusted_proxy,
        run=Path(args.run).resolve().name,
        log=log,
        rate_limit=rate_limit,
        live_lesson=args.live_lesson,
    )
    print(f"Clinora: {url}", flush=True)
    serve(app, listener)


def read_adapters(values: list[str]) -> dict[str, str]:
    """Read the values of --adapter: the folder of each run, by the adapter's name.

    Raises:
        ValueError: A value has another form, or two have the same name.
    """
    runs = {}
    for value in values:
        match = ADAPTER.fullmatch(value)
        if match is None:
            raise ValueError(
                f"--adapter {value}: expected NAME=RUN, with a name of 1 to 64 letters, digits, "
                "dots, hyphens and underscores"
            )
        if match["name"] in runs:
            raise ValueError(f"--adapter {value}: another adapter has this name already")
        runs[match["name"]] = match["run"]
    return runs


def check_addresses(args: argparse.Namespace) -> None:
    """Check names and addresses, and that a service for other machines has a password file.

    Raises:
        ValueError: A name or an address is malformed, or --auth-file or --allow-host is missing.
    """
    loopback = is_loopback(args.host)
    for name in args.allow_host:
        if not re.fullmatch(r"[A-Za-z0-9.-]+", name):
            raise ValueError(f"--allow-host {name}: expected a name alone, such as notes.example")
    for address in args.trusted_proxy:
        try:
            ipaddress.ip_network(address)
        except ValueError as error:
            raise ValueError(
                "--trusted-proxy: expected an address or a network, such as 127.0.0.1 or "
                f"10.0.0.0/28 ({error})"
            ) from None
    if loopback and not args.allow_host:
        return  # open to this machine only
    if not args.auth_file or not args.allow_host:
        raise ValueError(
            f"--host {args.host} is open to other machines, and so is any --allow-host: give "
            "--auth-file with the users' passwords, and --allow-host with the host name that "
            "browsers use"
        )


def is_loopback(host: str) -> bool:
    """Return whether a host is a loopback address.

    Raises:
        ValueError: The host is not an IPv4 address.
    """
    try:
        return ipaddress.IPv4Address(host).is_loopback
    except ValueError:
        raise ValueError(f"--host {host}: expected an IPv4 address, such as 0.0.0.0") from None


def take_port(host: str, port: int) -> socket.socket:
    """Open a listening socket.

    Raises:
        ValueError: The port is in use, or the port or the address does not exist.
    """
    try:
        return socket.create_server((host, port))
    except OverflowError as error:  # the number is not a port number
        reason = str(error)
    except OSError as error:
        reason = error.strerror or str(error)
    raise ValueError(f"{host}, port {port} ({reason}): choose another with --port")
