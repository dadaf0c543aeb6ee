import os
import sys

# OpenMP's threads wait asleep instead of spinning at their barriers: on a machine with something else to do, spinning
# takes twice as long and more, and on a quiet one it gains nothing. libgomp reads this when torch loads it, so scripts
# import this package first. Where torch is there already (torch.hub), the process is somebody else's.
if "torch" not in sys.modules:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
