"""Freed memory stays with the process."""

import platform
import subprocess
import sys

import pytest

FAULTS_OF_A_STEP = """
import resource
from components.heap import keep_freed_memory

def faults():
    blocks = [bytearray(2**20) for _ in range(64)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    del blocks
    blocks = [bytearray(2**20) for _ in range(64)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

as_it_is = faults()
assert keep_freed_memory()
faults()
print(as_it_is, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_a_step_that_allocates_what_the_last_one_freed_meets_no_new_pages():
    """64 MiB are 16,384 pages of 4 KiB."""
    done = subprocess.run([sys.executable, "-c", FAULTS_OF_A_STEP], capture_output=True, text=True, check=True)
    as_it_is, kept = map(int, done.stdout.split())
    assert as_it_is > 1000
    assert kept < 50
