"""What a container of the tests runs that is like those of users: an interpreter with a program of its own, a database and a
server beside it, and connections between them that stay open.

It says "holding" when all is set up, and then, each time it gets SIGUSR1, "state" with a JSON object: what each of the three
holds, told by itself over the connection that it has had from the start. The same words before a checkpoint, after it, and in
the restored container mean that nothing was lost. SIGTERM ends it.
"""

import hashlib
import http.client
import json
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import time


class Redis:
    """A Redis of its own, with one connection that is kept."""

    def __init__(self):
        self.process = subprocess.Popen(
            ["redis-server", "--bind", "127.0.0.1", "--save", "", "--appendonly", "yes", "--dir", "/var/lib/redis"],
            stdout=subprocess.DEVNULL)
        connection = retry(lambda: socket.create_connection(("127.0.0.1", 6379)))
        self.stream = connection.makefile("rwb")
        for i in range(1000):
            self.call("SET", f"key:{i}", random.randbytes(1000))
        for i in range(100):
            self.call("RPUSH", "list", str(i))
        self.call("EXPIRE", "key:1", "1000000")

    def call(self, *words):
        """One command of RESP: https://redis.io/docs/latest/develop/reference/protocol-spec/"""
        self.stream.write(b"*%d\r\n" % len(words))
        for word in words:
            word = word if isinstance(word, bytes) else word.encode()
            self.stream.write(b"$%d\r\n%s\r\n" % (len(word), word))
        self.stream.flush()
        return self.answer()

    def answer(self):
        line = self.stream.readline()
        kind, rest = line[:1], line[1:-2]
        if kind == b"$":
            length = int(rest)
            return None if length < 0 else self.stream.read(length + 2)[:-2]
        if kind == b"*":
            return [self.answer() for _ in range(int(rest))]
        if kind == b"-" or not kind:
            raise OSError(f"redis: {line!r}")
        return rest

    def state(self):
        self.call("SET", "written", "since")  # it goes on taking data
        if self.call("GETDEL", "written") != b"since":
            raise OSError("redis has not kept what was just written")
        content = hashlib.sha256()
        for i in range(1000):
            content.update(self.call("GET", f"key:{i}"))
        content.update(repr(self.call("LRANGE", "list", "0", "-1")).encode())
        expires = "armed" if int(self.call("TTL", "key:1")) > 0 else "gone"
        return f"{int(self.call('DBSIZE'))} keys {content.hexdigest()} expiry {expires}"


class Node:
    """A program for Node.js, asked over HTTP on one connection that is kept."""

    def __init__(self):
        self.process = subprocess.Popen(["node", "/programs/server.js"], stdout=subprocess.DEVNULL)
        self.connection = http.client.HTTPConnection("127.0.0.1", 8080)
        retry(self.connection.connect)
        self.connection.auto_open = 0  # an error, where the connection is lost, and not a new one
        self.ask("/fill")

    def ask(self, path):
        self.connection.request("GET", path)
        return self.connection.getresponse().read().decode()

    def state(self):
        ticks = int(self.ask("/ticks"))
        retry(lambda: check(int(self.ask("/ticks")) > ticks))
        return self.ask("/state") + ", ticking"


class Python:
    """This interpreter: a generator in the middle of its work, a stream of random numbers, a database in memory, and one in a
    file with a transaction that is open."""

    OTHER = """
import sqlite3
database = sqlite3.connect("/root/database", timeout=0)
print(database.execute("SELECT n FROM t").fetchall(), end=" ")
try:
    database.execute("INSERT INTO t VALUES (43)")
except sqlite3.OperationalError as error:
    print(error)
"""

    def __init__(self):
        self.squares = (i * i for i in range(10**9))
        self.next = 1000
        self.drawn = [next(self.squares) for _ in range(self.next)]
        self.random = random.Random(4711)
        self.random.random()
        self.memory = sqlite3.connect(":memory:")
        self.memory.execute("CREATE TABLE t (n INTEGER)")
        self.memory.executemany("INSERT INTO t VALUES (?)", ((i,) for i in range(1000)))
        self.file = sqlite3.connect("/root/database", isolation_level=None)
        self.file.execute("CREATE TABLE t (n INTEGER)")
        self.file.execute("BEGIN IMMEDIATE")
        self.file.execute("INSERT INTO t VALUES (42)")

    def state(self):
        pending = self.file.execute("SELECT n FROM t").fetchall()
        # The lock is the process's: another one has to try it.
        other = subprocess.run([sys.executable, "-c", self.OTHER], capture_output=True, text=True, check=False)
        total = self.memory.execute("SELECT sum(n) FROM t").fetchone()
        seen = hashlib.sha256(repr([self.drawn, self.random.getstate(), total]).encode()).hexdigest()
        generator = "in step" if next(self.squares) == self.next**2 else "out of step"
        self.next += 1
        return f"{seen} pending {pending}, others see {other.stdout.strip()}, generator {generator}"


def retry(what):
    """Until it works, for a minute at most."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return what()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def check(truth):
    if not truth:
        raise OSError("not yet")


def tell(what):
    try:
        return what.state()
    except Exception as error:  # pylint: disable=broad-except
        return f"lost: {error!r}"


def main():
    # Also while it is being set up.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGTERM})
    os.makedirs("/var/lib/redis", exist_ok=True)
    held = {"redis": Redis(), "node": Node(), "python": Python()}
    print("holding", flush=True)
    while signal.sigwait({signal.SIGUSR1, signal.SIGTERM}) == signal.SIGUSR1:
        print("state", json.dumps({name: tell(what) for name, what in held.items()}), flush=True)
    for child in (held["redis"], held["node"]):
        child.process.terminate()
        child.process.wait()


if __name__ == "__main__":
    sys.exit(main())
