#!/bin/sh
# Stands in for systemd-run, systemctl and sudo where Kubernetes' node e2e suite starts, kills and restarts its kubelet: by the name that it
# is called by. A unit is a script that runs its command; nothing restarts it by itself.
set -eu
units=/run/systemd-standin

pid() { # of a unit, nothing unless it runs
	running=$(cat "$units/$1.pid" 2>/dev/null) && kill -0 "$running" 2>/dev/null && echo "$running" || true
}

start() {
	setsid "$units/$1" </dev/null >/dev/null 2>&1 &
	echo $! >"$units/$1.pid"
}

stop() {
	pid=$(pid "$1")
	[ -z "$pid" ] || kill "$pid"
	while [ -n "$(pid "$1")" ]; do sleep 0.1; done
}

name=$(basename "$0")
case "$name ${1:-}" in
"sudo "*) exec "$@" ;;
"systemd-run --version") echo "systemd 257 (a stand-in)" ;;
"systemd-run "*)
	log=/dev/null unit=
	while :; do
		case $1 in
		-p)
			case $2 in StandardError=append:*) log=${2#StandardError=append:} ;; esac
			shift
			;;
		--unit=*) unit=${1#--unit=} ;;
		-*) ;;
		*) break ;;
		esac
		shift
	done
	unit=${unit%.service}
	mkdir -p "$units"
	{
		printf '#!/bin/sh\nexec 2>>%s\nexec' "$log"
		# In a unit's command line $ and % are doubled. None of the arguments has a quote.
		for argument; do printf " '%s'" "$argument"; done | sed 's/%%/%/g; s/[$][$]/$/g'
	} >"$units/$unit"
	chmod 0755 "$units/$unit"
	start "$unit"
	;;
"systemctl list-units")
	for file in "$units"/*.pid; do
		unit=$(basename "$file" .pid)
		if [ -n "$(pid "$unit")" ]; then
			echo "$unit.service loaded active running"
		elif [ $# = 2 ]; then # without --state=running
			echo "$unit.service loaded active exited"
		fi
	done
	;;
"systemctl reset-failed") ;;
"systemctl kill") kill "$(pid "${2%.service}")" ;;
"systemctl stop") stop "${2%.service}" ;;
"systemctl restart")
	stop "${2%.service}"
	start "${2%.service}"
	;;
*)
	echo "$name: this stand-in does not know: $*" >&2
	exit 1
	;;
esac
