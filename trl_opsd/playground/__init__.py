"""An embedded world to try the methods on: made on the spot, trained in minutes on two CPU cores."""

import os


# Worker threads that spin while they wait cost a small model more than they bring as soon as the cores are shared.
# OpenMP reads this once, when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
