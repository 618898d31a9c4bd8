"""Settings of serving, its addresses and its keys."""

import pytest

from ellm_jax.serving.errors import ErrorKind, ServiceError
from ellm_jax.serving.settings import ServeConfig, is_loopback, read_keys, split_address
from ellm_jax.serving.tenants import Keys, Tenant, bearer_token

KEY = "0123456789abcdef"


def test_keys_tell_tenants_apart():
    keys = Keys(ServeConfig(api_keys={"alice": KEY + "a", "bob": KEY + "b"}, admin_key=KEY + "c"))
    assert keys.authenticate(KEY + "a") == Tenant("alice")
    assert keys.authenticate(KEY + "c") == Tenant("admin", admin=True)
    for wrong in (None, "", KEY, KEY + "A", KEY + "é", "x" * 10_000):
        with pytest.raises(ServiceError) as caught:
            keys.authenticate(wrong)
        assert caught.value.kind is ErrorKind.UNAUTHENTICATED
    assert Tenant("alice").cache_salt != Tenant("bob").cache_salt
    anybody = Keys(ServeConfig(admin_key=KEY))
    assert anybody.authenticate(None) == anybody.authenticate("whatever") == Tenant("anonymous")
    assert anybody.authenticate(KEY).admin
    assert bearer_token("Bearer  x ") == bearer_token("bearer x") == "x"
    assert bearer_token("Basic x") is bearer_token(None) is bearer_token("Bearer ") is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"grpc": "0.0.0.0:1"}, "there are no keys"),
        ({"http": "[::]:1"}, "there are no keys"),
        ({"http": "example.org:1"}, "there are no keys"),
        ({"grpc": "127.0.0.1"}, "is no address"),
        ({"grpc": "127.0.0.1:70000"}, "is no address"),
        ({"api_keys": {"a": "short"}}, "16 or more"),
        ({"api_keys": {"a": KEY, "b": KEY}}, "the same key"),
        ({"api_keys": {"admin": KEY}}, "admin_key"),
        ({"api_keys": {"": KEY}}, "names have"),
        ({"tls_cert": "x"}, "belong together"),
        ({"tls_client_ca": "x"}, "needs tls_cert"),
        ({"max_queue": 0}, "max_queue=0"),
        ({"max_n": True}, "max_n=True"),
        ({"drain_s": -1}, "drain_s=-1"),
        ({"drain_s": float("nan")}, "drain_s=nan"),
        ({"log_level": "loud"}, "log_level"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        ServeConfig(**settings)


def test_settings_do_not_show_keys_and_addresses_are_read(tmp_path):
    config = ServeConfig(grpc="0.0.0.0:1", api_keys={"alice": KEY})
    assert KEY not in repr(config)
    assert ServeConfig(grpc="0.0.0.0:1", allow_unauthenticated=True).grpc == "0.0.0.0:1"
    assert split_address("[::1]:80") == ("::1", 80)
    hosts = {"127.0.0.1": True, "127.9.9.9": True, "::1": True, "localhost": True}
    hosts |= {"0.0.0.0": False, "10.0.0.1": False, "localhost.evil.org": False}
    assert {host: is_loopback(host) for host in hosts} == hosts
    file = tmp_path / "keys.json"
    file.write_text('{"alice": "' + KEY + '"}')
    assert read_keys(file) == {"alice": KEY}
    for text in ("[]", '{"a": 1}', "x"):
        file.write_text(text)
        with pytest.raises(ValueError, match="keys"):
            read_keys(file)
