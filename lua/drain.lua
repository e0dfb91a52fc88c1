-- The usual case of take, ahead of what only the others need: there is no mail,
-- all frames may be taken at once, and no sender waits for that.
do
  local call, name = redis.call, ARGV[3]
  local key, id, capacity = KEYS[1], string.sub(KEYS[1], 9, -2), tonumber(ARGV[6])
  local f = call('HMGET', key, name .. ':h', name .. ':q', name .. ':w')
  local size = tonumber(f[2] or 0)
  if f[1] == ARGV[2] and not f[3] and size <= tonumber(ARGV[5])
    and (ARGV[4] == '' or call('EXISTS', key .. ':m:' .. name) == 0) then
    local queue = key .. ':q:' .. name
    local frames = call('LRANGE', queue, 0, capacity)
    if #frames == 0 then return {'ok', {}, {}, 0, frames} end
    if #frames <= capacity then
      call('DEL', queue)
      call('HDEL', key, name .. ':q', name .. ':u')
      if size > 0 then
        if call('HINCRBY', 'parley:queued', id, -size) == 0 then call('HDEL', 'parley:queued', id) end
        call('HINCRBY', 'parley:queued', 'all', -size)
      end
      return {'ok', {}, {}, 0, frames}
    end
  end
end
