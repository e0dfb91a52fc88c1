-- Renews an instance's lease, and does what is due for all of them: takes the
-- seats of dead instances, frees those whose reservation is over, ends sessions.
-- ARGV: instance, 1 if it has had a lease, a name for these data if they have
-- none, how much to do at most.
local LEASES, GRACE, DATA = 'parley:leases', 'parley:grace', 'parley:data'
local batch = tonumber(ARGV[4])

local leased = tonumber(call('ZSCORE', LEASES, ME) or 0)
local lost = ARGV[2] == '1' and leased <= now()
local leases, living = call('ZCOUNT', LEASES, '(0', '+inf'), call('ZCOUNT', LEASES, '(' .. str(now()), '+inf')
if lost or leases > 0 and living == 0 then
  -- Perhaps Redis was away, and all instances are late.
  call('SET', GRACE, str(now() + LEASE), 'PX', math.ceil(LEASE / 1000))
end
call('ZADD', LEASES, str(now() + LEASE), ME)
expire(LEASES, KEEP)
call('SET', DATA, ARGV[3], 'NX')
expire(DATA, KEEP)

local budget = batch
local function due(key)
  if budget <= 0 then return {} end
  local all = call('ZRANGEBYSCORE', key, '-inf', str(now()), 'LIMIT', 0, budget)
  budget = budget - #all
  return all
end

local pruned = 0
local grace = tonumber(call('GET', GRACE) or 0)
if grace <= now() then
  for _, dead in ipairs(call('ZRANGEBYSCORE', LEASES, '-inf', str(now()), 'LIMIT', 0, 8)) do
    local key = 'parley:seats:' .. dead
    while budget > 0 do
      local held = call('SPOP', key)
      if not held then
        call('ZREM', LEASES, dead)
        break
      end
      budget = budget - 1
      local id, name = string.match(held, '^(%S+) (.*)$')
      local s = load(id)
      local h = s and holder(s, name)
      if h and string.sub(h, 1, #dead + 1) == dead .. ':' then
        leave(s, name, false)
        settle(s)
        pruned = pruned + 1
      end
    end
  end
end

for _, away in ipairs(due(AWAY)) do
  local id, name = string.match(away, '^(%S+) (.*)$')
  call('ZREM', AWAY, away)
  local s = load(id)
  if s and reserved(s, name) and num(s, name .. ':a') <= now() then
    set(s, 'L', now())
    free(s, name)
    settle(s)
  end
end

for _, id in ipairs(due(SESSIONS)) do
  local s = load(id)
  if s then
    -- Reservations end by AWAY, unless that was lost.
    for _, name in ipairs(names(s)) do
      if reserved(s, name) and num(s, name .. ':a') <= now() then
        set(s, 'L', now())
        free(s, name)
      end
    end
    settle(s)
  else -- its keys have expired, and all that waited in it
    local n = tonumber(call('HGET', QUEUED, id) or 0)
    if n ~= 0 then
      local lost = session(id)
      count(lost, -n)
      commitBytes(lost)
    end
    call('ZREM', SESSIONS, id)
    call('SREM', ROOMS, id)
  end
end

local last = call('ZRANGE', SESSIONS, -1, -1, 'WITHSCORES')
if last[2] then
  local life = tonumber(last[2]) - now()
  prolong(SESSIONS, life)
  prolong(QUEUED, life)
  prolong(LEASES, life)
end

-- When something is due next, in microseconds from now.
local soon = -1
for _, key in ipairs({AWAY, SESSIONS}) do
  local first = call('ZRANGE', key, 0, 0, 'WITHSCORES')[2]
  if first and (soon < 0 or tonumber(first) - now() < soon) then soon = math.max(tonumber(first) - now(), 0) end
end
if budget <= 0 then soon = 0 end
return reply('ok', lost and 1 or 0, call('GET', DATA), soon, pruned,
  call('ZCARD', SESSIONS), call('SCARD', ROOMS), tonumber(call('HGET', QUEUED, 'all') or 0), now())
