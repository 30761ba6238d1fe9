"""Serve a trained run as a page and an API: type a note, see its class.

python serve.py                       # the bundled adapter, at http://127.0.0.1:7860
python serve.py --run runs/demo --port 8000
python serve.py --host 0.0.0.0 --allow-host notes.example --auth-file passwords.txt
"""

import argparse
import ipaddress
import re
import signal
import socket
import sys

FLAGS = "flagged"  # in the working directory


def build_parser() -> argparse.ArgumentParser:
    """Describe the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", default="bundled", help="a folder that train.py wrote")
    parser.add_argument("--base", help="where the base is, if it has moved")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=7860, help="0: any that is free")
    parser.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME",
        help="a name that browsers know this machine by; needed beyond the loopback address",
    )  # fmt: skip
    parser.add_argument(
        "--auth-file", help="who may enter: lines of python -m clinora.serving.passwords NAME"
    )
    parser.add_argument(
        "--trusted-proxy", action="append", default=[], metavar="ADDRESS",
        help="a proxy (address or network) whose X-Forwarded-For and X-Forwarded-Proto are "
        "believed; give it once for each proxy",
    )  # fmt: skip
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--precision", default="auto", help="auto, bf16, fp16 or fp32")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Serve until Ctrl-C or SIGTERM; returns the exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    sys.stdout.reconfigure(errors="replace")  # a redirect on Windows is not UTF-8
    try:
        run_job(args)
    except (OSError, ValueError) as error:
        parser.exit(2, f"serve.py: {error}\n")
    return 0


def run_job(args: argparse.Namespace) -> None:
    """Take the port, load the run and serve it."""
    for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises them again at its end
        signal.signal(number, lambda *_: sys.exit(0))
    try:
        loopback = ipaddress.IPv4Address(args.host).is_loopback
    except ValueError:
        raise ValueError(f"--host {args.host}: expected an IPv4 address, as 0.0.0.0") from None
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
    if (not loopback or args.allow_host) and not (args.auth_file and args.allow_host):
        raise ValueError(
            f"--host {args.host} is open to other machines, and so is a name of --allow-host: give "
            "--auth-file with those who may enter, and --allow-host with the name that they know "
            "this machine by"
        )
    try:
        listener = socket.create_server((args.host, args.port))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"{args.host}, port {args.port} ({reason}): choose another with --port"
        ) from None
    with listener:
        # They take seconds, in which a signal already finds its handler.
        import clinora
        from clinora.device import keep_freed_memory
        from clinora.serving.app import create_app
        from clinora.serving.card import model_card
        from clinora.serving.passwords import read_passwords
        from clinora.serving.server import serve

        keep_freed_memory()
        users = args.auth_file and read_passwords(args.auth_file)
        classifier = clinora.Classifier.load(
            args.run, base=args.base, device=args.device, precision=args.precision
        )
        card = model_card(classifier, args.run)
        hosts = [*args.allow_host, args.host] if loopback else args.allow_host
        url = f"http://{args.host if loopback else hosts[0]}:{listener.getsockname()[1]}"
        app = create_app(
            classifier,
            FLAGS,
            hosts=hosts,
            users=users,
            card=card,
            url=url,
            trusted_proxies=args.trusted_proxy,
        )
        print(f"Clinora: {url}", flush=True)
        serve(app, listener)


if __name__ == "__main__":
    sys.exit(main())
