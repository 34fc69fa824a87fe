"""`distinf` and `python -m distinf`."""

import signal


def main() -> None:
    """The command line. Ctrl-C ends the process at once while it imports: there an exception can get lost, and a rank
    that went on alone would keep the job alive.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from distinf import cli

    signal.signal(signal.SIGINT, signal.default_int_handler)
    cli.main()


if __name__ == "__main__":
    main()
