#!/usr/bin/env bash
# Two hosts on one machine, for tests: network namespaces with addresses of their own, joined by a bridge, an sshd in each.
#   two_hosts.sh up DIR          make them; DIR gets the keys, a DeepSpeed hostfile, and env, to be sourced before `deepspeed`
#   two_hosts.sh on N COMMAND    run a command on host N (1 or 2)
#   two_hosts.sh cut N           pull the cable of host N          two_hosts.sh mend N    put it back
#   two_hosts.sh down            take all away
# Needs root, and Debian's iproute2, openssh-server and pdsh. The hosts share this machine's files, as nodes of a cluster do over NFS.
set -euo pipefail
net=10.78.0
bridge=burnish78
case "${1:-}" in
up)
  dir=$(mkdir -p "$2" && cd "$2" && pwd)
  mkdir -p /run/sshd
  ip link add $bridge type bridge
  ip addr add $net.1/24 dev $bridge
  ip link set $bridge up
  for key in client host; do ssh-keygen -q -t ed25519 -N '' -f "$dir/$key"; done
  install -m 600 "$dir/client.pub" "$dir/authorized"
  for i in 1 2; do
    ip netns add burnish$i
    ip link add cable78_$i type veth peer name eth0 netns burnish$i
    ip link set cable78_$i master $bridge up
    ip netns exec burnish$i ip addr add $net.1$i/24 dev eth0
    ip netns exec burnish$i ip link set eth0 up
    ip netns exec burnish$i ip link set lo up
    ip netns exec burnish$i /usr/sbin/sshd -h "$dir/host" -o PidFile="$dir/sshd$i.pid" -o AuthorizedKeysFile="$dir/authorized" \
      -o StrictModes=no -o PermitRootLogin=yes -o UsePAM=no
    echo "$net.1$i slots=1" >> "$dir/hostfile"
  done
  # gloo must be told its interface where the hosts' own names resolve to loopback
  printf 'GLOO_SOCKET_IFNAME=eth0\nDS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\n' > "$dir/deepspeed_env"
  # without ServerAlive pdsh would wait for a host that is cut off until TCP gives up, many minutes later
  cat > "$dir/env" <<ENV
export DS_ACCELERATOR=cpu DS_ENV_FILE="$dir/deepspeed_env"
export PDSH_SSH_ARGS_APPEND="-i $dir/client -o StrictHostKeyChecking=no -o UserKnownHostsFile=$dir/known_hosts -o ServerAliveInterval=2 -o ServerAliveCountMax=3"
ENV
  ;;
on) exec ip netns exec "burnish$2" "${@:3}" ;;
cut) ip link set "cable78_$2" down ;;
mend) ip link set "cable78_$2" up ;;
down)
  for i in 1 2; do
    # all that still runs there, sshd too: a process would keep its network alive without a name
    ip netns pids burnish$i 2>/dev/null | xargs --no-run-if-empty kill -9 2>/dev/null || true
    ip netns del burnish$i 2>/dev/null || true
    ip link del cable78_$i 2>/dev/null || true
  done
  ip link del $bridge 2>/dev/null || true
  ;;
*) sed -n '2,7p' "$0"; exit 2 ;;
esac
