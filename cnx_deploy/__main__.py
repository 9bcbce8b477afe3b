"""`python -m cnx_deploy` is `cnx-deploy`; where the package that reads the command line is missing, it is named."""

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line and leave the process with its exit code; with 5 without click, which all of it takes."""
    try:
        import click  # noqa: F401 - the next import takes it, and its absence is told from any other's
    except ModuleNotFoundError as error:
        if error.name != "click":
            raise
        sys.stderr.write("Error: click is not installed, expected it. Install it: pip install click\n")
        sys.exit(5)
    from cnx_deploy.cli import main as run

    run()


if __name__ == "__main__":
    main()
