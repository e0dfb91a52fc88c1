-- Names the instance that relays for a session: the first that was asked, until
-- its lease is over. KEYS[1] session; ARGV: instance, what its relay is reached at.
local s = load(idOf(KEYS[1]))
if not s or over(s) then return reply('gone') end
local by, at = string.match(get(s, 'R') or '', '^(%S+) (.*)$')
if not by or tonumber(call('ZSCORE', 'parley:leases', by) or 0) <= now() then
  by, at = ME, ARGV[2]
  call('HSET', s.key, 'R', by .. ' ' .. at)
end
return reply('ok', at)
