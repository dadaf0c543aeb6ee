import utils  # noqa: F401  before torch, see there
