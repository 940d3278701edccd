"""Answers of clients, by name; as a program, a client in a process of its own that can be killed."""

import sys
import time


def reverse(data):
    return data[::-1]


def slow(data):
    time.sleep(float(data))
    return data[::-1]


def wrong(data):
    if data == b"wrong":
        raise ValueError("the text of a patient")
    return data[::-1]


def kept(data, heard=[]):  # noqa: B006  # for as long as the process lives
    """Whatever was heard so far."""
    heard.append(data)
    return b" ".join(heard)


def text(data):
    return "text"


if __name__ == "__main__":
    _, engine, where, run, number, answer = sys.argv
    if engine == "nats":
        from hosfl.engines.nats_line import NatsLine

        NatsLine(where, run, int(number)).serve(globals()[answer])
