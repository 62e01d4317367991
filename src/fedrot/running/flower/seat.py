"""A site as a Flower ClientApp: it hands every message to `network.site.Site`, or to a resident worker that holds one,
and its reply back.
"""

import logging
from collections.abc import Callable

from flwr.app import Context
from flwr.app import Message as FlowerMessage
from flwr.clientapp import ClientApp

from fedrot.running.flower.records import from_records, to_records
from fedrot.running.network.channel import WorkerError
from fedrot.running.network.messages import Message, MessageError

Handle = Callable[[Message], Message]


def client_app(handle: Handle) -> ClientApp:
    """The app of a site whose requests `handle` answers."""
    app = ClientApp()

    def run(message: FlowerMessage, context: Context) -> FlowerMessage:
        try:
            reply = handle(from_records(message.content))
        except MessageError as problem:
            reply = Message.refusal(str(problem))
        except WorkerError as problem:  # says where the worker is, which is the site's to know
            logging.getLogger("fedrot").error("%s", problem)
            reply = Message.refusal("the site's worker did not answer; its log says why")
        return FlowerMessage(to_records(reply), reply_to=message)

    for register in (app.train, app.evaluate, app.query):
        register()(run)
    return app
