"""The parts of a relay: URLs, rates, frames, and https."""

from __future__ import annotations

import datetime
import math
import ssl
from pathlib import Path

import anyio
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from p2p_world import key
from relay_world import TOKEN
from tessera.core.errors import Invalid, Misbehaviour, Unavailable
from tessera.p2p.relay.bucket import TokenBucket, parse_rate
from tessera.p2p.relay.frames import (
    Kind,
    Status,
    challenge_frame,
    denial_frame,
    prove,
    restarting_frame,
    status_frame,
    verify_proof,
    ws_header,
)
from tessera.p2p.relay.server import Relay, RelayConfig
from tessera.p2p.relay.sight import judge
from tessera.p2p.relay.url import RelayUrl, canonical_url


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://203.0.113.7:3340", "http://203.0.113.7:3340"),
        ("HTTPS://Relay.Example/", "https://relay.example"),
        ("https://relay.example:443", "https://relay.example"),
        ("http://relay.example:80/", "http://relay.example"),
        ("https://relay.example:80", "https://relay.example:80"),
        ("http://[2001:DB8:0::1]:3340", "http://[2001:db8::1]:3340"),
    ],
)
def test_a_relay_has_one_spelling(text: str, url: str) -> None:
    assert canonical_url(text) == url
    assert canonical_url(url) == url


@pytest.mark.parametrize(
    "text",
    [
        "", "203.0.113.7:3340", "ftp://x", "http://", "http://x:0", "http://x:70000", "http://x/path", "http://x?a=b",
        "http://user:secret@x", "http://x#y", "http://x y", "http://[::1", "http://é.example", "http://" + "x" * 300,
        "http://-x", "http://x:port", None, 7,
    ],
)  # fmt: skip
def test_what_is_no_relays_url_is_refused(text: object) -> None:
    with pytest.raises(Invalid, match="relay's URL"):
        canonical_url(text)


def test_a_token_is_in_no_repr_and_no_message() -> None:
    assert TOKEN not in repr(RelayUrl("http://x", TOKEN))
    for token in ("short", "with space in it", "x" * 300, "newline\nnewline"):
        with pytest.raises(Invalid) as refused:
            RelayUrl("http://x", token)
        assert token not in str(refused.value)
    relay = RelayUrl("https://relay.example:8443")
    assert (relay.host, relay.port, relay.encrypted) == ("relay.example", 8443, True)
    assert RelayUrl("http://relay.example").port == 80


def test_a_bucket_lets_its_rate_pass_and_a_burst() -> None:
    bucket = TokenBucket(1_000_000, now=0)
    assert bucket.spend(100_000, now=0) == 0
    assert bucket.spend(500_000, now=0) == pytest.approx(0.5)
    assert bucket.spend(0, now=0.5) == pytest.approx(0)
    assert bucket.spend(1, now=1e6) == 0, "a long rest saves up no more than the burst"
    assert bucket.spend(1_000_000, now=1e6) == pytest.approx(0.9, abs=0.01)
    assert TokenBucket(math.inf, now=0).spend(1 << 40, now=0) == 0


@pytest.mark.parametrize(
    ("text", "rate"),
    [("20Mbit", 2.5e6), ("512kbit", 64e3), ("1.5 Gbit/s", 187.5e6), ("8000bps", 1e3), ("unlimited", math.inf)],
)
def test_rates_are_written_in_bits(text: str, rate: float) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize("text", ["", "20", "20MB", "-1Mbit", "0bit", "1bit", "fast", "1e9bit"])
def test_other_rates_are_refused(text: str) -> None:
    with pytest.raises(Invalid):
        parse_rate(text)


def test_frames_are_as_the_protocol_has_them() -> None:
    """That the engine reads and writes them alike is what `test_relay_links` shows."""
    seed, challenge = bytes(range(32)), bytes(range(16))
    proof = prove(seed, challenge)
    assert (len(proof), proof[0], proof[33]) == (98, Kind.PROOF, 64)
    assert verify_proof(proof, challenge).hex() == "03a107bff3ce10be1d70dd18e74bc09967e4d6309ba50d5f1ddc8664125531b8"
    assert challenge_frame(challenge) == b"\0" + challenge
    assert denial_frame("no") == b"\3\2no"
    assert status_frame(Status.LIMITED, 2) == b"\x0d\2"
    assert status_frame(Status.HEALTHY, 1) == b"\x0bhealthy again"
    assert restarting_frame(1, 2) == b"\x0c\0\0\0\1\0\0\0\2"
    assert [ws_header(size).hex() for size in (1, 126, 65_536)] == ["8201", "827e007e", "827f0000000000010000"]


def test_a_proof_is_bound_to_its_challenge_and_its_key() -> None:
    proof = prove(key(1).seed, bytes(16))
    for broken in (proof[:1] + bytes.fromhex(key(2).id) + proof[33:], proof[:-1] + bytes((proof[-1] ^ 1,))):
        with pytest.raises(Misbehaviour):
            verify_proof(broken, bytes(16))
    with pytest.raises(Misbehaviour):
        verify_proof(proof, bytes(15) + b"\1")
    for broken in (proof[:-1], proof + b"\0", b"\2" + proof[1:], b""):
        with pytest.raises(Invalid):
            verify_proof(broken, bytes(16))


@pytest.mark.parametrize(
    ("seen", "kind"),
    [
        ([], "unknown"),
        (["10.0.0.2:7"], "none"),
        (["198.51.100.1:7"], "some"),
        (["198.51.100.1:7", "198.51.100.1:7"], "same"),
        (["198.51.100.1:7", "198.51.100.1:8"], "varies"),
    ],
)
def test_sightings_tell_the_kind_of_router(seen: list[str], kind: str) -> None:
    assert judge(seen, {"10.0.0.2:7"}) == kind


@pytest.mark.parametrize(
    "config",
    [
        {"tokens": ("x",)}, {"max_clients": 0}, {"queue_bytes": 1000}, {"certificate": "only.pem"},
    ],
)  # fmt: skip
def test_a_relay_that_makes_no_sense_is_refused(config: dict[str, object]) -> None:
    with pytest.raises(Invalid):
        RelayConfig(**config)  # type: ignore[arg-type]


@pytest.mark.anyio
async def test_a_port_in_use_and_a_missing_certificate_are_named(tmp_path: Path) -> None:
    async with Relay.start(RelayConfig(sight=False)) as first:
        with pytest.raises(Unavailable, match=str(first.port)):
            async with Relay.start(RelayConfig(port=first.port)):
                pass
    nothing = str(tmp_path / "nothing.pem")
    with pytest.raises(Invalid, match=r"nothing\.pem"):
        async with Relay.start(RelayConfig(certificate=nothing, private_key=nothing)):
            pass


@pytest.mark.anyio
async def test_a_relay_serves_https_with_a_certificate(tmp_path: Path) -> None:
    certificate, private_key = make_certificate(tmp_path)
    config = RelayConfig(certificate=str(certificate), private_key=str(private_key), sight=False)
    async with Relay.start(config) as relay:
        assert relay.url.startswith("https://")
        trusting = ssl.create_default_context(cafile=str(certificate))
        async with await anyio.connect_tcp("127.0.0.1", relay.port, ssl_context=trusting) as stream:
            await stream.send(b"GET /generate_204 HTTP/1.1\r\nHost: x\r\nX-Iroh-Challenge: ts_x\r\n\r\n")
            answer = await stream.receive()
        assert answer.startswith(b"HTTP/1.1 204 ")
        assert b"X-Iroh-Response: response ts_x\r\n" in answer


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """For 127.0.0.1, signed by itself."""
    import ipaddress

    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "relay")])
    now = datetime.datetime.now(datetime.UTC)
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(names, critical=False)
        .sign(private, hashes.SHA256())
    )
    chain, secret = folder / "chain.pem", folder / "key.pem"
    chain.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    secret.write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return chain, secret
