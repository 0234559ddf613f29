"""What an operator wants to be sure of: an end that loses nothing, clients that vanish, clients that are slow.

python tools/clients/operations.py target/release/blip2 [--model FOLDER] [--frozen FOLDER] [--ends 20] [--aborts 500]

Starts servers of its own and prints a line for what it tried; exits with 1 when something is not as it should be. Takes
about three minutes. Standard library only.
"""

import argparse
import base64
import collections
import http.client
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import threading
import time

PICTURES = sorted((pathlib.Path(__file__).resolve().parents[2] / "assets" / "pictures").glob("*.jpg"))
PATIENCE = 180


class Server:
    """A running server."""

    def __init__(self, arguments, *more):
        command = [arguments.binary, "serve", "--port", "0", "--log-format", "json", *more]
        if arguments.model:
            command += ["--model", arguments.model]
        environment = dict(os.environ)
        if arguments.frozen:
            environment["BLIP2_FROZEN"] = arguments.frozen
        self.process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        self.address = None
        for line in self.process.stderr:
            try:
                event = json.loads(line)
            except ValueError:
                # What it says before its log begins, and why it ends.
                print(line.decode().rstrip(), file=sys.stderr)
                continue
            if event.get("message") == "listening":
                host, port = event["address"].rsplit(":", 1)
                self.address = (host, int(port))
                break
        if self.address is None:
            sys.exit("the server did not start: run the command by hand")
        threading.Thread(target=self.process.stderr.read, daemon=True).start()

    def get(self, path):
        connection = http.client.HTTPConnection(*self.address, timeout=PATIENCE)
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()

    def metrics(self):
        lines = self.get("/metrics")[1].splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}

    def end(self):
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=PATIENCE)


def body(number, **fields):
    """A request that differs from its neighbours."""
    picture = PICTURES[number % len(PICTURES)]
    url = "data:image/jpeg;base64," + base64.b64encode(picture.read_bytes()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": f"What is this, {number}?"}]
    return json.dumps({"messages": [{"role": "user", "content": content}], **fields}).encode()


def ask(server, data):
    """Status and whole body of one request on a connection of its own."""
    connection = http.client.HTTPConnection(*server.address, timeout=PATIENCE)
    headers = {"content-type": "application/json", "connection": "close"}
    connection.request("POST", "/v1/chat/completions", data, headers)
    response = connection.getresponse()
    return response.status, response.read()


def is_whole(data, status, answer):
    if status != 200:
        return False
    if b'"stream": true' in data[-60:]:
        return answer.endswith(b"data: [DONE]\n\n") and b'"finish_reason"' in answer and b'"error"' not in answer
    return bool(json.loads(answer)["choices"][0]["finish_reason"])


n_wrong = 0


def check(what, is_right, detail=""):
    global n_wrong
    n_wrong += not is_right
    print(f"{'ok   ' if is_right else 'WRONG'} {what} {detail}".rstrip(), flush=True)


def ends(arguments):
    """SIGTERM under load: whoever was sent to the server before it said that it is not ready gets a whole answer."""
    outcomes, codes = collections.Counter(), []
    lock = threading.Lock()

    def load(server, start, is_over):
        number = start
        while not is_over.is_set():
            data = body(number, max_tokens=16, stream=number % 2 == 0)
            number += 1
            try:
                status, answer = ask(server, data)
                outcome = "429" if status == 429 else "whole" if is_whole(data, status, answer) else f"{status} {answer[-200:]}"
            except (OSError, http.client.HTTPException) as error:
                outcome = repr(error)
            with lock:
                outcomes[outcome] += 1

    for _ in range(arguments.ends):
        server = Server(arguments, "--drain-delay-seconds", "1")
        is_over = threading.Event()
        threads = [threading.Thread(target=load, args=(server, 100 * i, is_over)) for i in range(16)]
        for thread in threads:
            thread.start()
        time.sleep(random.uniform(0.3, 2.5))
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        status, _ = server.get("/ready")
        is_over.set()
        check("not ready after SIGTERM", status == 503, status)
        for thread in threads:
            thread.join()
        codes.append(server.process.wait(timeout=PATIENCE))
    lost = {outcome: n for outcome, n in outcomes.items() if outcome not in ("whole", "429")}
    check(f"{arguments.ends} ends under load lose nothing", not lost and set(codes) == {0}, f"{dict(outcomes)}, exits {set(codes)}")


def aborts(arguments):
    """Clients that vanish, streaming or not, before the first token or after it."""
    server = Server(arguments, "--queue", "600")

    def vanish(number):
        data = body(number, max_tokens=200, min_tokens=200, stream=number % 2 == 0)
        with socket.create_connection(server.address, timeout=PATIENCE) as connection:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {server.address[0]}:{server.address[1]}\r\n"
            connection.sendall(f"{head}content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data)
            time.sleep(random.uniform(0, 1.5))

    for start in range(0, arguments.aborts, 50):
        threads = [threading.Thread(target=vanish, args=(start + i,)) for i in range(50)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    time.sleep(1)
    after = server.metrics()
    busy = {name: after[f"blip2_{name}"] for name in ("running_texts", "queue_requests", "connections")}
    is_free = busy["running_texts"] == 0 and busy["queue_requests"] == 0 and busy["connections"] <= 1
    check(f"{arguments.aborts} vanished clients leave nothing busy after a second", is_free, busy)
    check("an answer afterwards", ask(server, body(0, max_tokens=4))[0] == 200)
    check("no mistakes", after["blip2_panics_total"] == 0 and server.end() == 0)


def slow(arguments):
    """Clients that send or take a byte a second: they are cut off, and the others do not notice."""
    server = Server(arguments, "--max-connections", "400")
    host = f"{server.address[0]}:{server.address[1]}"
    results = collections.Counter()
    lock = threading.Lock()

    def tell(kind, outcome):
        with lock:
            results[f"{kind}: {outcome}"] += 1

    def drip(kind, first, piece):
        """Sends `first`, then a piece a second, until the server has enough of it."""
        start = time.monotonic()
        with socket.create_connection(server.address) as connection:
            connection.settimeout(1)
            try:
                connection.sendall(first)
                while time.monotonic() - start < 60:
                    try:
                        answer = connection.recv(4096)
                        outcome = answer.split(b"\r\n")[0].decode() or "closed"
                        return tell(kind, outcome)
                    except TimeoutError:
                        connection.sendall(piece)
                tell(kind, "still open after a minute")
            except (ConnectionError, BrokenPipeError):
                tell(kind, "closed")

    def starve(kind):
        """Asks for a page again and again on one connection and takes nothing of it."""
        start = time.monotonic()
        with socket.create_connection(server.address) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            request = f"GET /openapi.json HTTP/1.1\r\nhost: {host}\r\n\r\n".encode()
            connection.settimeout(1)
            try:
                while time.monotonic() - start < 90:
                    try:
                        connection.sendall(request * 20)
                    except TimeoutError:
                        pass
                tell(kind, "still open after 90 seconds")
            except (ConnectionError, BrokenPipeError):
                tell(kind, "closed")

    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
    kinds = [("slow headers", lambda: drip("slow headers", b"GET /health HTTP/1.1\r\n", b"x: y\r\n"))] * 100
    kinds += [("no headers", lambda: drip("no headers", b"", b""))] * 50
    stopped = (head + "content-length: 1000\r\n\r\n{").encode()
    kinds += [("slow body", lambda: drip("slow body", stopped, b""))] * 50
    kinds += [("slow reading", lambda: starve("slow reading"))] * 50
    threads = [threading.Thread(target=run) for _, run in kinds]
    for thread in threads:
        thread.start()
    times = []
    while any(thread.is_alive() for thread in threads):
        begin = time.monotonic()
        status, _ = ask(server, body(len(times), max_tokens=4))
        times.append(time.monotonic() - begin)
        if status != 200:
            check("an answer beside slow clients", False, status)
        time.sleep(0.2)
    for thread in threads:
        thread.join()
    still = [outcome for outcome in results if "still open" in outcome]
    check("slow clients are cut off", not still, dict(results))
    check("the others are answered", bool(times), f"{len(times)} answers, the slowest in {max(times):.2f} s")
    time.sleep(1)
    after = server.metrics()
    check("no connection is left", after["blip2_connections"] <= 1, after["blip2_connections"])
    check("an end", server.end() == 0)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("binary")
    parser.add_argument("--model")
    parser.add_argument("--frozen")
    parser.add_argument("--ends", type=int, default=20)
    parser.add_argument("--aborts", type=int, default=500)
    parser.add_argument("--only", choices=["ends", "aborts", "slow"])
    arguments = parser.parse_args()
    for run in (ends, aborts, slow):
        if arguments.only in (None, run.__name__):
            run(arguments)
    sys.exit(n_wrong > 0)


main()
