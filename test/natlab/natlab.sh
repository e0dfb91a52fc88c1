#!/usr/bin/env bash
# natlab.sh: a small internet in network namespaces, for testing NAT traversal.
# Needs root, iproute2 and nftables. Touches nothing outside its namespaces.
#
#   natlab.sh up [cloud [nohairpin]]   builds it (both homes: port-restricted);
#                                      cloud: srv has 10.0.0.2, and its public address is a NAT's
#   natlab.sh nat A|B KIND             sets a home's router; forgets its mappings
#   natlab.sh exec srv|a|a2|b CMD...   runs a command on a device
#   natlab.sh isolate on|off           a and a2 cannot reach each other in their home, as in a
#                                      guest Wi-Fi, or at a carrier (no hairpin either)
#   natlab.sh delay MS                 one way, for each way to the internet (needs sch_netem)
#   natlab.sh show | down
#
#   srv  203.0.113.10, 2001:db8:f::10                      (public)
#   A    router 203.0.113.101, devices a, a2 192.168.1.2, .3
#   B    router 203.0.113.102, device b      192.168.2.2
#
# KIND        mapping               filtering                 as in
# full        endpoint independent  endpoint independent      full cone
# addr        endpoint independent  address dependent         address-restricted cone
# port        endpoint independent  address and port dep.     most home routers (Linux masquerade)
# symmetric   address and port dep. address and port dep.     CGNAT, offices (masquerade fully-random)
# noudp       no UDP; any TCP out                             
# web         no UDP; only TCP to 80 and 443 out              hotels, offices
# none        no way out at all
set -euo pipefail
P=${NATLAB:-hnat}            # prefix of the namespaces: several labs at once
ns() { ip -n "$P-$1" "${@:2}"; }
ex() { ip netns exec "$P-$1" "${@:2}"; }

link() { # NS IF ADDR: a device's wire into the internet
  ns net link add "v-$1" type veth peer name wan netns "$P-$1"
  ns net link set "v-$1" master br0 up
  ns "$1" addr add "$3" dev wan; ns "$1" link set wan up; ns "$1" link set lo up
}
device() { # NS ROUTER ADDR GATEWAY
  ns "$2" link add "v-$1" type veth peer name eth0 netns "$P-$1"
  ns "$2" link set "v-$1" master lan up
  ns "$1" addr add "$3" dev eth0; ns "$1" link set eth0 up; ns "$1" link set lo up
  ns "$1" route add default via "$4"
}
up() {
  down
  for n in net rs srv ra rb a a2 b; do ip netns add "$P-$n"; done
  for n in net rs srv ra rb a a2 b; do ex $n sysctl -qw net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.default.disable_ipv6=1; done
  # Where the host filters what it bridges, its rules would meet these frames too.
  for n in net rs ra rb; do ex $n sysctl -qw net.bridge.bridge-nf-call-iptables=0 2>/dev/null || true; done
  ns net link add br0 type bridge; ns net link set br0 up; ns net link set lo up
  if [ "${1:-}" = cloud ]; then
    link rs wan 203.0.113.10/24
    ns rs link add lan type bridge; ns rs link set lan up; ns rs addr add 10.0.0.1/24 dev lan
    ex rs sysctl -qw net.ipv4.ip_forward=1
    device srv rs 10.0.0.2/24 10.0.0.1
    local from='iifname "wan"'; [ "${2:-}" = nohairpin ] || from=''
    ex rs nft -f - <<NFT
table ip lab {
  chain before { type nat hook prerouting priority dstnat; $from ip daddr 203.0.113.10 dnat to 10.0.0.2; }
  chain after { type nat hook postrouting priority srcnat; ip saddr 10.0.0.2 snat to 203.0.113.10; }
  chain forwarding { type filter hook forward priority 0; ip daddr 203.0.113.10 drop; }
}
NFT
  else link srv wan 203.0.113.10/24; fi
  link ra wan 203.0.113.101/24
  link rb wan 203.0.113.102/24
  for r in ra rb; do
    ns $r link add lan type bridge; ns $r link set lan up
    ex $r sysctl -qw net.ipv4.ip_forward=1
  done
  ns ra addr add 192.168.1.1/24 dev lan; ns rb addr add 192.168.2.1/24 dev lan
  device a ra 192.168.1.2/24 192.168.1.1
  device a2 ra 192.168.1.3/24 192.168.1.1
  device b rb 192.168.2.2/24 192.168.2.1
  nat A port; nat B port
}
nat() { # A|B KIND
  local r masq="masquerade" out="" cone="" learn="" map=""
  case $1 in A) r=ra ;; B) r=rb ;; *) echo "natlab: no home $1" >&2; exit 2 ;; esac
  case $2 in
    full) map='map cone { type inet_service : ipv4_addr; flags dynamic,timeout; timeout 5m; }'
          learn='oifname "wan" meta l4proto udp update @cone { udp sport : ip saddr }'
          cone='iifname "wan" meta l4proto udp dnat to udp dport map @cone' ;;
    addr) map='map cone { type ipv4_addr . inet_service : ipv4_addr; flags dynamic,timeout; timeout 5m; }'
          learn='oifname "wan" meta l4proto udp update @cone { ip daddr . udp sport : ip saddr }'
          cone='iifname "wan" meta l4proto udp dnat to ip saddr . udp dport map @cone' ;;
    port) ;;
    symmetric) masq="masquerade fully-random" ;;
    noudp) out='iifname "lan" meta l4proto udp drop' ;;
    web) out='iifname "lan" tcp dport != { 80, 443 } drop; iifname "lan" meta l4proto != tcp drop' ;;
    none) out='iifname "lan" drop' ;;
    *) echo "natlab: no kind $2" >&2; exit 2 ;;
  esac
  ex $r nft -f - <<NFT
flush ruleset
table ip lab {
  $map
  chain before  { type nat hook prerouting priority dstnat; $cone; }
  chain after { type nat hook postrouting priority srcnat; oifname "wan" $masq; }
  chain learn { type filter hook postrouting priority -150; $learn; }
  chain incoming  { type filter hook input priority 0; iifname "wan" ct state new drop; }
  chain forwarding  { type filter hook forward priority 0; $out
    iifname "wan" ct status dnat accept
    iifname "wan" ct state new drop; }
}
NFT
  if command -v conntrack >/dev/null; then ex $r conntrack -F >/dev/null 2>&1 || true; fi
}
delay() { for n in ${NODES:-srv ra rb}; do ex $n tc qdisc replace dev wan root netem delay "$1ms"; done; }
isolate() { for d in a a2; do ns ra link set "v-$d" type bridge_slave isolated "$1"; done; }
down() {
  for n in net rs srv ra rb a a2 b; do
    if [ -e "/run/netns/$P-$n" ]; then
      local pids; pids=$(ip netns pids "$P-$n" || true)
      if [ -n "$pids" ]; then kill $pids 2>/dev/null || true; fi  # only what runs in this lab
      ip netns del "$P-$n"
    fi
  done
}
show() { for r in ra rb; do echo "== $r"; ex $r nft list ruleset; ex $r conntrack -L 2>/dev/null || true; done; }
case ${1:-} in
  up) up "${@:2}" ;;
  down) down ;;
  nat) nat "$2" "$3" ;;
  isolate) isolate "$2" ;;
  delay) delay "$2" ;;
  show) show ;;
  exec) shift; n=$1; shift; exec ip netns exec "$P-$n" "$@" ;;
  *) sed -n '2,/^set/p' "$0" | sed '$d'; exit 2 ;;
esac
