"""Serve a trained run as a page and an API: type a note, see its predicted class.

Without options: the bundled adapter, at http://127.0.0.1:7860.

Examples:
{command} --run runs/demo --port 8000
{command} --host 0.0.0.0 --allow-host notes.example --auth-file passwords.txt
"""

import argparse
import ipaddress
import re
import signal
import socket
import sys

from clinora.commands import (
    STOPPED,
    add_machine_options,
    as_typed,
    check_run,
    new_parser,
    one_line_errors,
)

FLAGS = "flagged"  # folder in the working directory, made at the first flag


def build_parser(prog: str = "clinora serve") -> argparse.ArgumentParser:
    """Describe the options."""
    parser = new_parser(prog, __doc__.format(command=as_typed(prog, "serve")))
    add = parser.add_argument
    add("--run", default="bundled", help="folder of a trained run (default: %(default)s)")
    add("--base", help="where the base is, if it has moved (default: the run's)")
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    add("--port", type=int, default=7860, help="0: any that is free (default: %(default)s)")
    add(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name by which browsers know this machine; needed beyond the loopback address "
        "(default: none)",
    )
    add(
        "--auth-file",
        help="who may enter: lines of python -m clinora.serving.passwords NAME (default: none)",
    )
    add(
        "--trusted-proxy",
        action="append",
        default=[],
        metavar="ADDRESS",
        help="a proxy (address or network) whose X-Forwarded-For and X-Forwarded-Proto are "
        "believed; give it once for each proxy (default: none)",
    )
    add_machine_options(parser)
    return parser


def main(argv: list[str] | None = None, prog: str = "clinora serve") -> int:
    """Serve until Ctrl-C or SIGTERM; returns the exit status."""
    with one_line_errors(prog):
        args = build_parser(prog).parse_args(argv)
        sys.stdout.reconfigure(errors="replace")  # a redirect on Windows is not UTF-8
        # uvicorn raises them again at its end, when every request has its answer.
        signal.signal(signal.SIGINT, lambda *_: sys.exit(STOPPED))
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        serve_run(args, prog)
    return 0


def serve_run(args: argparse.Namespace, prog: str) -> None:
    """Take the port, load the run and serve it."""
    check_addresses(args)
    with take_port(args.host, args.port) as listener:
        check_run(args.run, prog)
        from clinora.classifier import Classifier
        from clinora.device import keep_freed_memory
        from clinora.serving.app import create_app, serve
        from clinora.serving.card import model_card
        from clinora.serving.passwords import read_passwords

        keep_freed_memory()
        users = None if args.auth_file is None else read_passwords(args.auth_file)
        classifier = Classifier.load(
            args.run, base=args.base, device=args.device, precision=args.precision
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
            hosts=hosts,
            users=users,
            card=model_card(classifier, args.run),
            url=url,
            trusted_proxies=args.trusted_proxy,
        )
        print(f"Clinora: {url}", flush=True)
        serve(app, listener)


def check_addresses(args: argparse.Namespace) -> None:
    """Check the names and addresses, and that a page open to other machines asks who enters.

    Raises:
        ValueError: One is malformed, or --auth-file or --allow-host is missing.
    """
    loopback = is_loopback(args.host)
    for name in args.allow_host:
        if not re.fullmatch(r"[A-Za-z0-9.-]+", name):
            raise ValueError(f"--allow-host {name}: expected a name alone, as notes.example")
    for address in args.trusted_proxy:
        try:
            ipaddress.ip_network(address)
        except ValueError as error:
            raise ValueError(
                f"--trusted-proxy: expected an address or a network, as 127.0.0.1 or 10.0.0.0/28 "
                f"({error})"
            ) from None
    is_open = not loopback or args.allow_host
    is_guarded = args.auth_file and args.allow_host
    if is_open and not is_guarded:
        raise ValueError(
            f"--host {args.host} is open to other machines, and so is a name of --allow-host: give "
            "--auth-file with those who may enter, and --allow-host with the name that they know "
            "this machine by"
        )


def is_loopback(host: str) -> bool:
    """Tell whether an IPv4 address is this machine's own.

    Raises:
        ValueError: It is not an IPv4 address.
    """
    try:
        return ipaddress.IPv4Address(host).is_loopback
    except ValueError:
        raise ValueError(f"--host {host}: expected an IPv4 address, as 0.0.0.0") from None


def take_port(host: str, port: int) -> socket.socket:
    """Listen on an address.

    Raises:
        ValueError: The port is taken, or there is no such port or address.
    """
    try:
        return socket.create_server((host, port))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{host}, port {port} ({reason}): choose another with --port") from None
