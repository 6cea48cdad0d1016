import http.client
import threading
import time
from urllib.parse import urlsplit

import pytest

from demo.origin import Origin, Served

CONTENT = bytes(range(256)) * 5000  # 1.28 MB: several chunks and a part of one


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "weights 1-0676ba61.pth"
    path.write_bytes(CONTENT)
    return path


def ask(url, method="GET", path=None):
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=30)
    connection.request(method, path or parts.path)
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response, body


def test_serves_the_file_and_counts_exact_bytes(path):
    with Origin(path) as origin:
        responses = [ask(origin.url) for _ in range(3)]
    for response, body in responses:
        assert (response.status, body) == (200, CONTENT)
        assert response.headers["Content-Length"] == str(len(CONTENT))
    assert len({response.headers["ETag"] for response, _ in responses}) == 1
    assert origin.served == Served(requests=3, body_bytes=3 * len(CONTENT))


def test_counts_concurrent_downloads(path):
    bodies = []
    with Origin(path) as origin:
        clients = [threading.Thread(target=lambda: bodies.append(ask(origin.url)[1])) for _ in range(8)]
        for client in clients:
            client.start()
        for client in clients:
            client.join(30)
    assert bodies == [CONTENT] * 8
    assert origin.served == Served(8, 8 * len(CONTENT))


def test_head_and_unknown_paths_count_as_requests_without_bytes(path):
    with Origin(path) as origin:
        head, head_body = ask(origin.url, "HEAD")
        missing, _ = ask(origin.url, path="/other.pth")
        queried, queried_body = ask(origin.url, path=urlsplit(origin.url).path + "?token=1")
    assert (head.status, head_body, head.headers["Content-Length"]) == (200, b"", str(len(CONTENT)))
    assert missing.status == 404
    assert (queried.status, queried_body) == (200, CONTENT)
    assert origin.served == Served(3, len(CONTENT))


def test_another_content_has_another_etag(path):
    with Origin(path) as origin:
        before = ask(origin.url)[0].headers["ETag"]
        path.write_bytes(CONTENT + b"more")
        after, body = ask(origin.url)
    assert after.headers["ETag"] != before
    assert body == CONTENT + b"more"


def test_all_downloads_together_get_the_rate(path):
    rate = 4 * len(CONTENT)
    started = time.monotonic()
    with Origin(path, rate) as origin:
        clients = [threading.Thread(target=ask, args=(origin.url,)) for _ in range(4)]
        for client in clients:
            client.start()
        for client in clients:
            client.join(30)
    # Four files at four files a second; the last chunk goes out at the start of its turn, not at its end.
    assert time.monotonic() - started >= 0.9
    assert origin.served == Served(4, 4 * len(CONTENT))


def test_a_client_that_hangs_up_does_not_stop_the_origin(tmp_path, capfd):
    # More than socket buffers hold, so that the origin notices.
    path = tmp_path / "large.pth"
    path.write_bytes(bytes(64 << 20))
    with Origin(path) as origin:
        parts = urlsplit(origin.url)
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=30)
        connection.request("GET", parts.path)
        assert connection.getresponse().read(1000) == bytes(1000)
        connection.close()
        assert len(ask(origin.url)[1]) == 64 << 20
    assert origin.served.requests == 2
    assert 64 << 20 < origin.served.body_bytes < 128 << 20
    assert capfd.readouterr() == ("", "")
