"""A learning switch for os-ken, after its simple_switch_13."""

import os
import sys

from os_ken import cfg
from os_ken.base.app_manager import AppManager, OSKenApp
from os_ken.controller import controller, ofp_event
from os_ken.controller.handler import (
    CONFIG_DISPATCHER,
    MAIN_DISPATCHER,
    set_ev_cls,
)
from os_ken.lib.packet import ethernet, packet
from os_ken.ofproto import ofproto_v1_3


class LearningSwitch(OSKenApp):
    OFP_VERSIONS = [ofproto_v1_3.OFP_VERSION]

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.ports = {}

    @staticmethod
    def add(datapath, priority, match, actions):
        parser = datapath.ofproto_parser
        apply = datapath.ofproto.OFPIT_APPLY_ACTIONS
        instructions = [parser.OFPInstructionActions(apply, actions)]
        datapath.send_msg(
            parser.OFPFlowMod(
                datapath=datapath,
                priority=priority,
                match=match,
                instructions=instructions,
            )
        )

    @set_ev_cls(ofp_event.EventOFPSwitchFeatures, CONFIG_DISPATCHER)
    def connected(self, event):
        datapath = event.msg.datapath
        ofproto, parser = datapath.ofproto, datapath.ofproto_parser
        everything = parser.OFPActionOutput(
            ofproto.OFPP_CONTROLLER, ofproto.OFPCML_NO_BUFFER
        )
        self.add(datapath, 0, parser.OFPMatch(), [everything])

    @set_ev_cls(ofp_event.EventOFPPacketIn, MAIN_DISPATCHER)
    def arrived(self, event):
        message = event.msg
        datapath = message.datapath
        ofproto, parser = datapath.ofproto, datapath.ofproto_parser
        port = message.match["in_port"]
        header = packet.Packet(message.data).get_protocols(ethernet.ethernet)[0]
        self.ports[header.src] = port
        out = self.ports.get(header.dst, ofproto.OFPP_FLOOD)
        actions = [parser.OFPActionOutput(out)]
        if out != ofproto.OFPP_FLOOD:
            match = parser.OFPMatch(
                in_port=port, eth_dst=header.dst, eth_src=header.src
            )
            self.add(datapath, 1, match, actions)
        datapath.send_msg(
            parser.OFPPacketOut(
                datapath=datapath,
                buffer_id=message.buffer_id,
                in_port=port,
                actions=actions,
                data=message.data,
            )
        )


if __name__ == "__main__":
    listen = ["--ofp-listen-host", "127.0.0.1", "--ofp-tcp-listen-port", sys.argv[1]]
    cfg.CONF(args=listen, project="os_ken", version="test")
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    AppManager.run_apps(["learning_switch"])
