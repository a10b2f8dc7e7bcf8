"""Connections that can only end at public addresses, whatever a URL or a redirect says.

A host name is resolved once, the answers are checked, and the connection goes to a checked address
(never to the name), so a name server that answers differently the second time changes nothing.
TLS certificates are still verified against the name.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Awaitable, Callable, Collection, Iterable

import anyio
import httpcore
import httpx

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolver = Callable[[str, int], Awaitable[list[str]]]

# Prefix under which IPv6-only networks reach IPv4 hosts (RFC 6052): the last 32 bits are the host.
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_IPV4_BITS = 0xFFFFFFFF


class RefusedAddress(Exception):
    """The host has no public address; the message names the host and what it resolved to."""


class UnknownHost(Exception):
    """The name cannot be resolved."""


def _carried_ipv4(address: Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address that an IPv6 address leads to (mapped, 6to4, Teredo, NAT64)."""
    if isinstance(address, ipaddress.IPv4Address):
        return None
    if address.teredo is not None:
        return address.teredo[1]
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & _IPV4_BITS)
    return address.ipv4_mapped or address.sixtofour


def is_public(text: str) -> bool:
    """Whether an address is one that the whole internet shares.

    False for private, loopback, link-local (cloud metadata services), carrier-grade NAT, multicast,
    reserved and unspecified addresses, also when wrapped in IPv6, and for what is no address.
    """
    try:
        # A zone ("fe80::1%eth0") belongs to link-local addresses alone.
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return False
    # An IPv4 address inside is where the connection ends, whatever the outer address is called:
    # NAT64's own prefix is global, and leads to the metadata service as well.
    carried = _carried_ipv4(address)
    if carried is not None:
        return is_public(str(carried))
    # fec0::/10 is deprecated, which `ipaddress` takes for global; networks still route it inside.
    site_local = isinstance(address, ipaddress.IPv6Address) and address.is_site_local
    return (
        address.is_global
        and not address.is_multicast
        and not address.is_reserved
        and not site_local
    )


async def resolve(host: str, port: int) -> list[str]:
    """Addresses of a host in the order of preference of the system.

    Raises:
        UnknownHost: the name does not exist or its server does not answer.
    """
    try:
        answers = await anyio.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise UnknownHost(f"{host}: cannot be resolved") from None
    return list(dict.fromkeys(str(answer[4][0]) for answer in answers))


class CheckedBackend(httpcore.AsyncNetworkBackend):
    """Opens TCP connections to checked addresses only.

    Args:
        private_hosts: names or addresses, as written in URLs, that may be anywhere (an intranet).
        resolver: (host, port) -> addresses.
        inner: what connects to a numeric address.
    """

    def __init__(
        self,
        private_hosts: Collection[str] = (),
        resolver: Resolver = resolve,
        inner: httpcore.AsyncNetworkBackend | None = None,
    ) -> None:
        self._private_hosts = frozenset(host.lower() for host in private_hosts)
        self._resolver = resolver
        self._inner = inner or httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Connect to the first checked address that answers.

        Raises:
            RefusedAddress: every address of the host is private.
            UnknownHost: no address at all.
        """
        try:
            with anyio.fail_after(timeout):
                addresses = await self._resolver(host, port)
        except TimeoutError:
            raise httpcore.ConnectTimeout(f"{host}: name not resolved in time") from None
        if not addresses:
            raise UnknownHost(f"{host}: has no address")
        # Public ones among the answers stay: a host with a private second address is no attack by
        # itself, and only checked addresses are connected to.
        if host.lower() not in self._private_hosts:
            refused = addresses
            addresses = [address for address in addresses if is_public(address)]
            if not addresses:
                raise RefusedAddress(f"{host} is {', '.join(refused)}, not a public address")
        failure: Exception | None = None
        # In the system's order, each until it answers: IPv6 is often announced and does not lead
        # anywhere.
        for address in addresses:
            try:
                return await self._inner.connect_tcp(
                    address, port, timeout, local_address, socket_options
                )
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as problem:
                failure = problem
        assert failure is not None
        raise failure

    async def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Never: no URL of a photograph leads to a local socket."""
        raise RefusedAddress(f"{path} is a local socket")

    async def sleep(self, seconds: float) -> None:
        """Wait; the connection pool calls it between its own attempts."""
        await self._inner.sleep(seconds)


class CheckedTransport(httpx.AsyncHTTPTransport):
    """httpx over `CheckedBackend`; proxies of the environment are not used.

    Args:
        connections: upper bound of open connections.
        backend: what opens them.
    """

    def __init__(self, connections: int, backend: CheckedBackend) -> None:
        # Reading the certificates takes longer than a fetch: once for both.
        certificates = httpx.create_ssl_context(trust_env=False)
        super().__init__(verify=certificates, trust_env=False)
        # httpx has no argument for the network backend; a test pins that this one is used.
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=certificates,
            max_connections=connections,
            max_keepalive_connections=connections,
            keepalive_expiry=15.0,
            network_backend=backend,
        )
