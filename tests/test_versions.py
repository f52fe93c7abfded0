"""What is installed is told by its version, what is not as unknown."""

import torch

from dpt_t2i.versions import installed, told


def test_versions():
    assert installed("no-such-package") is None
    assert told("torch", "no-such-package") == {"torch": torch.__version__, "no-such-package": "unknown"}
