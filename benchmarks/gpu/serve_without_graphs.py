"""Runs the server's command line with engines that record no CUDA graphs, which no setting asks for."""

from typing import Any

from router.cli.main import main


def no_capturer(device: Any) -> None:
    """Stand in for `engines.models.cuda_graphs.capturer_for`."""


if __name__ == "__main__":
    from engines.loading import builders

    vars(builders)["capturer_for"] = no_capturer
    main()
