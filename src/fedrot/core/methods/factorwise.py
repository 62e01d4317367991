"""Methods that average the factors one by one, without turning them."""

from dataclasses import dataclass
from typing import ClassVar

from fedrot.core.methods.base import Capabilities, Method, register


@register
@dataclass(frozen=True)
class FedIT(Method):
    """FedIT: the server averages A and B separately, (sum p_i A_i, sum p_i B_i).

    The product of the averages is not the average of the products: the difference is the cross-covariance
    sum p_i (B_i - Bbar)(A_i - Abar), the aggregation error.
    """

    name: ClassVar[str] = "fedit"
    paper: ClassVar[str] = "arXiv 2305.05644"
    capabilities: ClassVar[Capabilities] = Capabilities(reduction="sum")
