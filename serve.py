"""Serve a trained run as a page for this machine: type a note, see its class.

python serve.py                       # the bundled adapter, at http://127.0.0.1:7860
python serve.py --run runs/demo --port 8000
"""

import argparse
import signal
import socket
import sys

HOST = "127.0.0.1"
FLAGS = "flagged"  # in the working directory


def main(argv: list[str] | None = None) -> int:
    """Serve until Ctrl-C or SIGTERM; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", default="bundled", help="a folder that train.py wrote")
    parser.add_argument("--base", help="where the base is, if it has moved")
    parser.add_argument("--port", type=int, default=7860, help="0: any that is free")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--precision", default="auto", help="auto, bf16, fp16 or fp32")
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
        listener = socket.create_server((HOST, args.port))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"port {args.port} ({reason}): choose another with --port") from None
    with listener:
        # They take seconds, in which a signal already finds its handler.
        import clinora
        from clinora.serving.app import create_app, serve

        classifier = clinora.Classifier.load(
            args.run, base=args.base, device=args.device, precision=args.precision
        )
        app = create_app(classifier, FLAGS)
        print(f"Clinora: http://{HOST}:{listener.getsockname()[1]}", flush=True)
        serve(app, listener)


if __name__ == "__main__":
    sys.exit(main())
