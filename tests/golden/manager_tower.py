"""The reference vectors of this folder, run by the two-tower family's runners."""

from tests.golden.two_tower import RUNNERS as RUNNERS
