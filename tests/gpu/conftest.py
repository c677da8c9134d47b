"""The corpus and recipe of the distributed tests, on a GPU."""

from tests.distributed.conftest import workplace as workplace
