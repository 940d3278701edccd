"""Certificates and broker permissions of a federation on several machines. No torch; needs the extra `nats`.

One authority signs a certificate for the broker, the server and each client. The broker accepts only connections with
one of these certificates, and limits what each may do: client K publishes at `hosfl.RUN.up.K.>` and subscribes to
`hosfl.RUN.down.K.>`; the server publishes at `hosfl.RUN.down.>` and subscribes to `hosfl.RUN.up.>`. Nobody has
`_INBOX.>`: a reply goes to a subject to which its receiver may subscribe.
"""

from hosfl.federation.broker import check_broker, check_permissions
from hosfl.federation.certificates import FederationError
from hosfl.federation.member import Member
from hosfl.federation.provision import add, create, read, renew, revoke
from hosfl.federation.roster import Address, Roster

__all__ = [
    "Address",
    "FederationError",
    "Member",
    "Roster",
    "add",
    "check_broker",
    "check_permissions",
    "create",
    "read",
    "renew",
    "revoke",
]
