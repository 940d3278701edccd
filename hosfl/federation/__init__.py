"""A federation on several machines: who may connect to its broker, and as whom. Without torch; needs the extra `nats`.

One authority signs a certificate for the broker, the server and each client. The broker lets in whom one of these
names, and each does no more than its part: client K publishes `hosfl.RUN.up.K.>` and subscribes `hosfl.RUN.down.K.>`,
the server publishes `hosfl.RUN.down.>` and subscribes `hosfl.RUN.up.>`. Nobody has `_INBOX.>`: a reply goes to a
subject that its receiver may subscribe.
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
