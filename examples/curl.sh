#!/bin/sh
# Mints a code, redeems it, and shows that it works once.
#
#   examples/curl.sh [URL of the server]

set -eu
server=${1:-http://localhost:1234}
server=${server%/}

fail() {
	echo "curl.sh: $*" >&2
	exit 1
}

# post PATH BODY STATUS makes a call, prints its answer, and fails unless it has that status.
post() {
	answer=$(curl -sS --max-time 10 -X POST "$server$1" \
		-H 'content-type: application/json' -d "$2" -w '\n%{http_code}') || fail "no answer from $server: is parley running there?"
	status=${answer##*
}
	answer=${answer%
*}
	[ "$status" = "$3" ] || fail "POST $1 was answered $status, not $3: $answer"
	printf '%s\n' "$answer"
}

# field NAME prints a field of the JSON object on stdin, if it is a string without escapes.
field() {
	sed -n "s/.*\"$1\":\"\([^\"]*\)\".*/\1/p"
}

command -v curl >/dev/null || fail "curl is not installed"

minted=$(post /rendezvous/code '{}' 200)
code=$(printf '%s' "$minted" | field code)
echo "minted:     $minted"

redeemed=$(post /rendezvous/redeem "{\"code\":\"$code\"}" 200)
echo "redeemed:   $redeemed"

minted_id=$(printf '%s' "$minted" | field appID)
redeemed_id=$(printf '%s' "$redeemed" | field appID)
[ "$minted_id" = "$redeemed_id" ] || fail "the two appIDs differ"

again=$(post /rendezvous/redeem "{\"code\":\"$code\"}" 410)
echo "once more:  $again"

echo "Both sides now know the appID $minted_id: they meet at /ws?appID=$minted_id&side=A and side=B."
