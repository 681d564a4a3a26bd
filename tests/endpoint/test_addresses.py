"""Images are downloaded from public addresses only: each is checked before connecting, and no other is used."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import sys

import pytest
from support.daemon import KEY, REMOTE_NAME
from support.scripted import Scripted, over_tls, response, small_image, through_proxy

from imagewatch.config.key import Key
from imagewatch.config.schema import Endpoint
from imagewatch.endpoint import connection as network
from imagewatch.endpoint.client import Client
from imagewatch.endpoint.download import Downloads, FetchError
from imagewatch.endpoint.http_clients import Clients

IMAGE = small_image()
REMOTE = Endpoint(base_url=f"https://{REMOTE_NAME}", connect_timeout_seconds=2.0)
PUBLIC = "93.184.216.34"


class Wire:
    """Records every address that this process connects to, and allows only those of this machine."""

    def __init__(self):
        self.tried = []
        self.is_watching = False
        sys.addaudithook(self)

    def __call__(self, event, arguments):
        if self.is_watching and event == "socket.connect" and isinstance(arguments[1], tuple):
            self.tried.append(arguments[1][0])
            if not ipaddress.ip_address(arguments[1][0].partition("%")[0]).is_loopback:
                raise ConnectionRefusedError("a test is not to leave this machine")


_WIRE = Wire()  # an audit hook cannot be removed


@pytest.fixture
def wire():
    _WIRE.tried.clear()
    _WIRE.is_watching = True
    yield _WIRE
    _WIRE.is_watching = False


class Resolver:
    """A name server that gives one reply after the other, and then repeats the last one."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.asked = []

    def __call__(self, host, port, *_, **__):
        self.asked.append(host)
        addresses = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return [
            (
                socket.AF_INET6 if ":" in one else socket.AF_INET,
                socket.SOCK_STREAM,
                socket.IPPROTO_TCP,
                "",
                (one, port, 0, 0) if ":" in one else (one, port),
            )
            for one in addresses
        ]


def fetched(url, endpoint=REMOTE, resolver=None):
    """Download an image; return its content."""
    came = []
    with contextlib.closing(Client(endpoint, lambda: Key(KEY), resolve=resolver)) as client:
        client.fetch(url, came.append, 1_000_000, 30)
    return b"".join(came)


def refusal(url, endpoint=REMOTE, resolver=None):
    with pytest.raises(FetchError) as caught:
        fetched(url, endpoint, resolver)
    assert caught.value.final
    return str(caught.value)


# Which addresses are public: the special-purpose registries of IANA as of 2025, and others that no host has

NOT_PUBLIC = [
    *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24"),
    *("192.0.0.8/32", "192.0.0.9/32", "192.0.0.10/32", "192.0.0.170/31", "192.0.2.0/24", "192.88.99.0/24"),
    *("192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
    *("::/128", "::1/128", "::ffff:0:0/104", "::ffff:10.0.0.0/104", "64:ff9b:1::/48", "64:ff9b::10.0.0.0/104"),
    *("100::/64", "100:0:0:1::/64", "2001::/23", "2001::/32", "2001:1::1/128", "2001:2::/48", "2001:3::/32"),
    *("2001:10::/28", "2001:20::/28", "2001:30::/28", "2001:db8::/32", "2002:a00::/24", "2002:7f00::/24", "3fff::/20"),
    *("5f00::/16", "fc00::/7", "fe80::/10", "fec0::/10", "ff00::/8", "4000::/3", "::10.0.0.0/104"),
]


@pytest.mark.parametrize("network", NOT_PUBLIC)
def test_no_address_of_a_private_network_is_allowed(network):
    downloads, block = Downloads(REMOTE, Clients(REMOTE)), ipaddress.ip_network(network)
    first, last = int(block.network_address), int(block.broadcast_address)
    for number in {first, first + (last - first) // 2, max(first, last - 1), last}:
        assert not downloads._may_connect(str(type(block.network_address)(number)))


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::1", "2606:4700::1"]
)
def test_a_public_address_is_allowed(address):
    assert Downloads(REMOTE, Clients(REMOTE))._may_connect(address)


# Checked before connecting

NOTATIONS = [
    *("169.254.169.254", "2852039166", "0xa9fea9fe", "0251.0376.0251.0376", "0xa9.254.43518", "169.254.43518"),
    *(
        "127.0.0.1",
        "127.1",
        "0x7f.1",
        "2130706433",
        "127.0.0.1.",
        "127.1.",
        "127。0。0。1",
        "\uff11\uff12\uff17.0.0.1",
        "①②⑦.0.0.1",
    ),
    *("localhost", "LOCALHOST", "localhost.", "a.localhost", "\uff4cocalhost", "0", "0.0.0.0"),
    *("[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:a9fe:a9fe]", "[fe80::1%25lo]", "[fe80::1%lo]", "[fd00::1]"),
    *("[64:ff9b::7f00:1]", "[2002:7f00:1::]", "[2606:4700::1%lo]", "10.0.0.1", "192.168.1.1:8080", "%31%32%37.1"),
]


@pytest.mark.parametrize("host", NOTATIONS)
def test_a_private_address_in_any_notation_is_not_connected_to(wire, host):
    with pytest.raises(FetchError):
        fetched(f"https://{host}/x.png")
    assert wire.tried == []


@pytest.mark.parametrize(
    "url", ["https://a.example:70000/", "https://a%20b/", "https://[::1/", "https://", "https://a:b/"]
)
def test_an_ambiguous_url_is_not_downloaded(wire, url):
    assert "URL" in refusal(url, resolver=Resolver([PUBLIC]))
    assert wire.tried == []


@pytest.mark.parametrize("addresses", [["10.0.0.1"], ["127.0.0.1"], ["fd00::1"], ["::1"], [PUBLIC, "127.0.0.1"]])
def test_a_name_with_a_private_address_is_not_connected_to_even_if_its_other_addresses_are_public(wire, addresses):
    assert "not public" in refusal("https://images.example/x.png", resolver=Resolver(addresses))
    assert wire.tried == []


def test_a_redirect_to_a_private_address_is_not_followed(wire):
    def script(exchange):
        exchange.head()
        exchange.send(response(b"", b"Location: http://2852039166/latest", status=b"302 Found"))

    with Scripted(script) as server:
        local = Endpoint(base_url=server.base_url)
        assert "not public" in refusal(server.base_url + "/x", local)
    assert wire.tried == ["127.0.0.1"]


def test_the_message_about_a_refused_address_does_not_reveal_what_is_there():
    found = [["10.0.0.1"], ["127.0.0.1"], ["fe80::1%1"], ["::ffff:10.0.0.1"]]
    messages = {refusal("https://images.example/x.png", resolver=Resolver(one)) for one in found}
    assert messages == {"https://images.example/x.png: the address is not public"}
    assert refusal("https://127.1/x.png") == "https://127.1/x.png: the address is not public"


# The checked address is the one that is connected to


def test_a_name_is_resolved_once_so_a_name_server_with_changing_replies_reaches_nothing(wire):
    def script(exchange):
        heads.append(exchange.head())
        exchange.send(response(IMAGE))

    heads = []
    with Scripted(script) as server:
        local = Endpoint(base_url=server.base_url)
        resolver = Resolver(["127.0.0.1"], ["10.0.0.1"])
        assert fetched(f"http://images.example:{server.port}/x.png", local, resolver) == IMAGE
    assert resolver.asked == ["images.example"]
    assert wire.tried == ["127.0.0.1"]
    assert b"\r\nhost: images.example:%d\r\n" % server.port in heads[0].lower() + b"\r\n"


def test_if_one_address_of_a_name_does_not_respond_the_next_is_tried(wire):
    def script(exchange):
        exchange.head()
        exchange.send(response(IMAGE))

    with Scripted(script) as server:
        local, resolver = Endpoint(base_url=server.base_url), Resolver(["127.0.0.9", "127.0.0.1"])
        assert fetched(f"http://images.example:{server.port}/x.png", local, resolver) == IMAGE
    assert wire.tried == ["127.0.0.9", "127.0.0.1"]


@pytest.mark.parametrize(("name", "is_right"), [(REMOTE_NAME, True), ("another.invalid", False)])
def test_a_certificate_must_match_the_name_whatever_the_address(wire, certificate, name, is_right):
    def script(exchange):
        exchange.head()
        exchange.send(response(IMAGE))

    names = []
    certificate.context.sni_callback = lambda _, messages, __: names.append(messages)
    endpoint = Endpoint(base_url=REMOTE.base_url, ca_file=certificate.path, allow_private_downloads=True)
    with Scripted(over_tls(certificate.context, script)) as server:
        url, resolver = f"https://{name}:{server.port}/x.png", Resolver(["127.0.0.1"])
        if is_right:
            assert fetched(url, endpoint, resolver) == IMAGE
        else:
            with pytest.raises(FetchError, match="certificate"):
                fetched(url, endpoint, resolver)
    certificate.context.sni_callback = None
    assert names == [name]
    assert wire.tried == ["127.0.0.1"]


def test_nothing_is_sent_on_a_connection_that_the_http_library_opened_itself(monkeypatch):
    monkeypatch.setattr(network, "install", lambda *_: None)
    received = []
    with Scripted(lambda exchange: received.append(exchange.drain())) as server:
        with pytest.raises(RuntimeError, match="unexpected connection"):
            fetched(server.base_url + "/x.png", Endpoint(base_url=server.base_url))
        server.wait_for(1)
    assert received == [0]


# Behind a proxy


@pytest.mark.parametrize("host", NOTATIONS)
def test_a_proxy_is_not_asked_for_a_private_address_in_any_notation(wire, monkeypatch, host):
    with Scripted() as proxy:
        through_proxy(monkeypatch, proxy)
        with pytest.raises(FetchError):
            fetched(f"https://{host}/x.png")
    assert wire.tried == []


def test_a_proxy_resolves_names_itself(wire, monkeypatch):
    def script(exchange):
        heads.append(exchange.head())
        exchange.send(response(b"", status=b"403 Forbidden"))

    heads = []
    with Scripted(script) as proxy:
        through_proxy(monkeypatch, proxy)
        resolver = Resolver(["127.0.0.1"])
        with pytest.raises(FetchError, match="403"):
            fetched("https://images.example/x.png", resolver=resolver)
    assert heads[0].startswith(b"CONNECT images.example:443 ")
    assert resolver.asked == ["127.0.0.1"]
    assert wire.tried == ["127.0.0.1"]
