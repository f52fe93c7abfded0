"""Settings of the whole suite, made before anything imports torch."""

import os

# The models are tiny: threads would spend their time waiting for each other, many times over on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
