"""Load on a running `blip2 serve`: many clients, each asking about the sample pictures as fast as it is answered.

python bench/serve_load.py http://127.0.0.1:8080 --clients 1 16 64 --seconds 60 [--pid PID]

For each number of clients: answers and tokens a second, times of an answer, how many were sent away (429), and every other
status, which should not be. With --pid the server's resident memory, looked at every second: before, and how far it went from
its median after the warm-up. Standard library only.
"""

import argparse
import base64
import collections
import http.client
import json
import os
import pathlib
import statistics
import threading
import time
import urllib.parse

PICTURES = sorted((pathlib.Path(__file__).resolve().parents[1] / "assets" / "pictures").glob("*.jpg"))
QUESTIONS = ["What is this?", "What colour is it?", "Is there a dog?", "How many are there?", ""]


def bodies(max_tokens, min_tokens):
    """Requests that differ in picture and question."""
    for number, picture in enumerate(PICTURES):
        url = "data:image/jpeg;base64," + base64.b64encode(picture.read_bytes()).decode()
        for question in QUESTIONS:
            content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
            request = {"messages": [{"role": "user", "content": content}], "max_tokens": max_tokens}
            request["min_tokens"] = min_tokens
            yield json.dumps(request).encode()


def client(url, requests, start, until, seen):
    """Asks until the time is over; keeps statuses, times and tokens."""
    number = start
    connection = None
    while time.monotonic() < until:
        body = requests[number % len(requests)]
        number += 1
        begin = time.monotonic()
        try:
            if connection is None:
                connection = http.client.HTTPConnection(url.hostname, url.port, timeout=180)
            headers = {"content-type": "application/json"}
            if key := os.environ.get("BLIP2_API_KEY"):
                headers["authorization"] = f"Bearer {key}"
            connection.request("POST", "/v1/chat/completions", body, headers)
            response = connection.getresponse()
            answer = json.loads(response.read())
        except (OSError, http.client.HTTPException, ValueError) as error:
            seen.append((type(error).__name__, time.monotonic() - begin, 0))
            connection = None
            continue
        tokens = answer["usage"]["completion_tokens"] if response.status == 200 else 0
        seen.append((response.status, time.monotonic() - begin, tokens))
        if response.status == 429:
            time.sleep(float(response.headers["retry-after"]))


def resident_mib(pid):
    for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    return float("nan")


def watch(pid, start, until, seen):
    """Looks at the memory once a second until the time is over; keeps when and how much."""
    while (now := time.monotonic()) < until:
        seen.append((now - start, resident_mib(pid)))
        time.sleep(max(min(1, until - time.monotonic()), 0))


def spread(values):
    """The median and the extremes, and these as parts of it."""
    values = sorted(values)
    median = statistics.median(values)
    percent = {f"{name}_percent": round(100 * (value / median - 1), 2) for name, value in
               [("least", values[0]), ("p99", values[int(0.99 * (len(values) - 1))]), ("most", values[-1])]}
    return {"median": round(median), **percent}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--max-tokens", type=int, default=24)
    parser.add_argument("--min-tokens", type=int, default=0, help="the same as --max-tokens: answers of one length")
    parser.add_argument("--pid", type=int, help="the server, whose memory is watched")
    parser.add_argument("--warm-up", type=float, default=60, help="seconds before memory counts; at most half of --seconds")
    arguments = parser.parse_args()
    url = urllib.parse.urlsplit(arguments.url)
    requests = list(bodies(arguments.max_tokens, arguments.min_tokens))
    for n in arguments.clients:
        until = time.monotonic() + arguments.seconds
        seen = []
        threads = [threading.Thread(target=client, args=(url, requests, 7 * i, until, seen)) for i in range(n)]
        start, memory = time.monotonic(), []
        if arguments.pid:
            threads.append(threading.Thread(target=watch, args=(arguments.pid, start, until, memory)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        took = time.monotonic() - start
        statuses = collections.Counter(status for status, _, _ in seen)
        times = sorted(time for status, time, _ in seen if status == 200) or [float("nan")]
        line = {
            "clients": n,
            "answers_per_second": round(statuses[200] / took, 2),
            "tokens_per_second": round(sum(tokens for _, _, tokens in seen) / took, 1),
            "median_seconds": round(statistics.median(times), 3),
            "p99_seconds": round(times[int(0.99 * (len(times) - 1))], 3),
            "statuses": {str(status): count for status, count in statuses.items()},
        }
        if arguments.pid:
            warm = min(arguments.warm_up, arguments.seconds / 2)
            after = spread([mib for at, mib in memory if at >= warm])
            line["resident_mib"] = {"before": round(memory[0][1]), **after}
        print(json.dumps(line), flush=True)


main()
