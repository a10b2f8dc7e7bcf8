"""Connections that can only end at public addresses, whatever a URL or a redirect says.

A host name is resolved once, the answers are checked, and the connection goes to a checked address
(never to the name), so a name server that answers differently the second time changes nothing.
TLS certificates are still verified against the name.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection

import aiohttp
import certifi
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.client_proto import ResponseHandler
from aiohttp.connector import Connection
from aiohttp.tracing import Trace

from components.corpus.sources.download_journal import FetchFailed

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
    loop = asyncio.get_running_loop()
    try:
        answers = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise UnknownHost(f"{host}: cannot be resolved") from None
    return list(dict.fromkeys(str(answer[4][0]) for answer in answers))


class CheckedResolver(AbstractResolver):
    """Gives checked addresses of a name only.

    Args:
        private_hosts: names or addresses, as written in URLs, that may be anywhere (an intranet).
        resolver: (host, port) -> addresses.
        timeout_s: of one look-up.
    """

    def __init__(
        self, private_hosts: Collection[str], resolver: Resolver, timeout_s: float
    ) -> None:
        self._private_hosts = frozenset(host.lower() for host in private_hosts)
        self._resolver = resolver
        self._timeout_s = timeout_s

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """The checked addresses, in the resolver's order; the connector tries one after another.

        Raises:
            RefusedAddress: every address of the host is private.
            UnknownHost: no address at all.
        """
        async with asyncio.timeout(self._timeout_s):
            addresses = await self._resolver(host, port)
        if not addresses:
            raise UnknownHost(f"{host}: has no address")
        return [
            ResolveResult(hostname=host, host=address, port=port, family=family, proto=0, flags=0)
            for address in self.checked(host, addresses)
        ]

    def checked(self, host: str, addresses: list[str]) -> list[str]:
        """Those that may be connected to.

        Raises:
            RefusedAddress: none of them.
        """
        # Public ones among the answers stay: a host with a private second address is no attack by
        # itself, and only checked addresses are connected to.
        if host.lower() in self._private_hosts:
            return addresses
        public = [address for address in addresses if is_public(address)]
        if not public:
            raise RefusedAddress(f"{host} is {', '.join(addresses)}, not a public address")
        return public

    async def close(self) -> None:
        """Nothing is held."""


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class CheckedConnector(aiohttp.TCPConnector):
    """Connections to checked addresses, kept open for the next request to the same host.

    Args:
        connections: upper bound of those in use, and of those that wait for a next request.
        resolver: what every name goes through, before every new connection.
    """

    def __init__(self, connections: int, resolver: CheckedResolver) -> None:
        certificates = ssl.create_default_context(cafile=certifi.where())
        certificates.set_alpn_protocols(["http/1.1"])
        super().__init__(
            ssl=certificates,
            limit=connections,
            keepalive_timeout=15.0,
            resolver=resolver,
            # A name is looked up for every connection: a remembered address would be one that
            # nobody has checked for this host and moment.
            use_dns_cache=False,
        )
        self._checks = resolver
        self._resting: OrderedDict[ResponseHandler, None] = OrderedDict()

    async def connect(
        self, req: aiohttp.ClientRequest, traces: list[Trace], timeout: aiohttp.ClientTimeout
    ) -> Connection:
        """A connection for a request, opened or from the pool.

        Raises:
            RefusedAddress: no address of its host may be connected to.
            UnknownHost: its host has no address.
        """
        host = req.url.raw_host or ""
        # aiohttp asks its resolver for names alone.
        if _is_address(host):
            self._checks.checked(host, [host])
        connection = await super().connect(req, traces, timeout)
        protocol = connection.protocol
        assert protocol is not None
        self._resting.pop(protocol, None)
        connection.add_callback(lambda: self._rest(protocol))
        return connection

    def _rest(self, protocol: ResponseHandler) -> None:
        # aiohttp bounds the connections in use, not those that wait: a list of a million hosts
        # would leave one open at each. The one that has waited longest goes.
        if protocol.should_close:
            return
        self._resting[protocol] = None
        if len(self._resting) > self.limit:
            self._resting.popitem(last=False)[0].close()


def failed_exchange(problem: Exception) -> FetchFailed:
    """The class of a transport problem; details never hold ports or times of this run."""
    # Details go into a table that DVC hashes: two runs over the same failing host must write the
    # same bytes.
    if isinstance(problem, RefusedAddress):
        return FetchFailed("refused_address", str(problem))
    if isinstance(problem, UnknownHost):
        return FetchFailed("unknown_host", str(problem))
    if isinstance(problem, TimeoutError):
        return FetchFailed("timeout", "no complete answer in time", retry=True)
    if isinstance(problem, aiohttp.InvalidURL):
        # The one spelling that a normalised address may have and aiohttp does not connect to:
        # "127.1" and "2130706433", which systems read as an address.
        return FetchFailed("refused_address", "a number in place of an address")
    if isinstance(problem, aiohttp.ClientResponseError):
        # No HTTP, or a head without end: the same again, whenever it is asked for. Without what
        # follows the colon, which is the stranger's bytes.
        return FetchFailed("bad_answer", f"no HTTP: {problem.message.partition(':')[0]}")
    cause: BaseException | None = problem
    while cause is not None:
        # aiohttp wraps these: only the chain of causes tells a wrong certificate from a port on
        # which nothing listens. Its wrappers are SSL errors as well, without a reason.
        if isinstance(cause, ssl.SSLError) and not isinstance(cause, aiohttp.ClientError):
            return FetchFailed("tls", cause.reason or "TLS error")
        cause = cause.__cause__ or cause.__context__
    if isinstance(problem, aiohttp.ClientConnectorError):
        return FetchFailed("refused_connection", "nothing listens there")
    return FetchFailed("truncated", "connection ended before the answer did", retry=True)
