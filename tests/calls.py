"""What tests/base calls in other processes. It stands apart, as a new process imports it by its name."""

import os
import time

import torch

from dansm import BadInput


def slow_at_first(number, of):
    time.sleep(0.3 * (number == 0))
    return number, of, os.getpid(), torch.get_num_threads()


def refuse_or_wait(number):
    if number == 0:
        raise BadInput("number is 0: expected another")
    time.sleep(200)


def tell_and_wait(folder, number):
    (folder / str(os.getpid())).touch()
    time.sleep(200)
