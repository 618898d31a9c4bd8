"""TLS and mutual TLS, with certificates made here."""

import datetime
import ipaddress

import pytest

pytest.importorskip("grpc", reason="serving needs pip install 'ellm-jax[serve]'")
pytest.importorskip("cryptography", reason="certificates are made with the extra `test`")

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from grpc_server import RunningGrpc, checked_engine

from ellm_jax import SamplingParams
from ellm_jax.client import Client, ClientError, Retries, Tls


class Authority:
    """Signs certificates; its own is in `file`."""

    def __init__(self, folder, name):
        self._folder, self._name = folder, name
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._certificate = self._sign(self._key, name, self._key, name, ca=True)
        self.file = folder / f"{name}.pem"
        self.file.write_bytes(self._certificate.public_bytes(serialization.Encoding.PEM))

    def issue(self, name):
        """Files with a certificate and its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._sign(key, name, self._key, self._name, ca=False)
        files = self._folder / f"{name}.crt", self._folder / f"{name}.key"
        files[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        files[1].write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return tuple(map(str, files))

    @staticmethod
    def _sign(key, name, signer, signer_name, *, ca):
        now = datetime.datetime.now(datetime.UTC)
        address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, signer_name)]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=5))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([address]), critical=False)
            .sign(signer, hashes.SHA256())
        )


@pytest.fixture(scope="module")
def engine():
    with checked_engine() as engine:
        yield engine


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("tls"), "authority")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("stranger"), "stranger")


def says(address, tls):
    with Client(address, tls=tls, retries=Retries(attempts=1), timeout_s=20) as client:
        return client.generate("Once", SamplingParams(max_tokens=2)).text


def refused(address, tls):
    with pytest.raises(ClientError) as caught:
        says(address, tls)
    return caught.value.code is grpc.StatusCode.UNAVAILABLE


def test_clients_that_trust_the_authority_are_served(engine, authority, stranger):
    cert, key = authority.issue("server")
    with RunningGrpc(engine, tls_cert=cert, tls_key=key) as server:
        assert says(server.address, Tls(ca=authority.file))
        assert refused(server.address, Tls(ca=stranger.file))
        assert refused(server.address, None)


def test_mutual_tls_serves_those_whom_the_authority_knows(engine, authority, stranger):
    cert, key = authority.issue("server")
    mine, my_key = authority.issue("client")
    other, other_key = stranger.issue("other")
    files = {"tls_cert": cert, "tls_key": key, "tls_client_ca": str(authority.file)}
    with RunningGrpc(engine, **files) as server:
        assert says(server.address, Tls(authority.file, mine, my_key))
        assert refused(server.address, Tls(authority.file))
        assert refused(server.address, Tls(authority.file, other, other_key))


def test_files_that_are_not_there_are_named(engine, authority):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.(pem|key)"):
        RunningGrpc(engine, tls_cert="nowhere.pem", tls_key="nowhere.key")
