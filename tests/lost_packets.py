#!/usr/bin/env python3
"""Creates and updates issues concurrently until SIGTERM, and prints a line for each acknowledged write.

    python3 tests/lost_packets.py ADDRESS TOKEN_FILE

Each call has a request id and is repeated until it succeeds, also after SIGTERM. Used by tests/lost_packets.sh.
"""

import os
import signal
import sys
import threading
import time
import uuid

import grpc

from blackbox import Tracker

CLIENTS = 8
ATTEMPT_SECONDS = 5
OUTCOME_SECONDS = 120
RETRIED = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED,
           grpc.StatusCode.CANCELLED, grpc.StatusCode.ABORTED}

stopping = threading.Event()


def call(tracker, method, **fields):
    """Repeats a call with the same request id until it succeeds."""
    began, request_id = time.monotonic(), str(uuid.uuid4())
    while True:
        try:
            return tracker.call("IssueService", method, request_id=request_id, timeout=ATTEMPT_SECONDS, **fields)
        except grpc.RpcError as error:
            if error.code() not in RETRIED or time.monotonic() - began > OUTCOME_SECONDS:
                raise
            time.sleep(0.1)


def acknowledge(line):
    # In one piece: print writes the end of the line separately.
    os.write(sys.stdout.fileno(), f"{line}\n".encode())


def write(tracker, client, issue_id):
    number = 0
    while not stopping.is_set():
        number += 1
        title = f"issue {client}-{number}"
        call(tracker, "CreateIssue", issue={"title": title})
        acknowledge(f"create {title}")
        title = f"update {client}-{number}"
        call(tracker, "UpdateIssue", issue={"id": issue_id, "title": title})
        acknowledge(f"update {title}")


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__.strip())
    with open(sys.argv[2], encoding="ascii") as file:
        tracker = Tracker(sys.argv[1], file.read().strip())
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    issue_id = tracker.call("IssueService", "CreateIssue", issue={"title": "shared"}).id
    # Fails the process, and not only its thread.
    threading.excepthook = lambda failed: (print(failed.exc_value, file=sys.stderr, flush=True), os._exit(1))
    clients = [threading.Thread(target=write, args=(tracker, nth, issue_id)) for nth in range(CLIENTS)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()


if __name__ == "__main__":
    main()
