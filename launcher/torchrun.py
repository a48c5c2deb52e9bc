"""torchrun that ends with the exit code of the rank that failed first, where torchrun itself makes 1 of any code."""

import sys


def main() -> int:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    try:
        torchrun()
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code  # killed by a signal: as shells say it
    return 0


if __name__ == "__main__":
    sys.exit(main())
