-- The usual case of post, ahead of what only the others need: a relay frame to
-- the other seat of a pair, which is connected and keeps up.
do
  local call, from, to = redis.call, ARGV[3], ARGV[3] == 'A' and 'B' or 'A'
  if ARGV[5] == 'r' and (from == 'A' or from == 'B') and (ARGV[4] == '' or ARGV[4] == to) then
    local key, id, size = KEYS[1], string.sub(KEYS[1], 9, -2), tonumber(ARGV[7])
    local f = call('HMGET', key, 'k', from .. ':h', to .. ':h', to .. ':q')
    if f[1] == 'p' and f[2] == ARGV[2] and f[3] and (f[4] or 0) + size <= math.min(HOLD, LONG_QUEUE) then
      local queue = key .. ':q:' .. to
      if call('RPUSH', queue, ARGV[6]) == 1 then
        call('PEXPIRE', queue, math.ceil((RESUME_TTL + SESSION_TTL + 8 * LEASE) / 1000))
      end
      call('HINCRBY', key, to .. ':q', size)
      call('HINCRBY', 'parley:queued', id, size)
      if call('HINCRBY', 'parley:queued', 'all', size) == size then
        call('PEXPIRE', 'parley:queued', math.max(call('PTTL', 'parley:sessions'), 1000))
      end
      if ARGV[8] == '1' then return {'ok', {}, {}, 0, 0, {f[3]}} end
      local instance, number = string.match(f[3], '^(.-):(.*)$')
      if instance == ARGV[1] then return {'ok', {'n' .. number}, {}, 0, 0, {}} end
      call('PUBLISH', 'parley:wake:' .. instance, 'n' .. number)
      return {'ok', {}, {}, 0, 0, {}}
    end
  end
end
