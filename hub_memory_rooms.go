package main

import (
	"context"
	"slices"
	"sync"
	"time"
)

// What the hub in memory does for rooms alone.

// roomCodes says which room has which code.
type roomCodes struct {
	mu    sync.Mutex           // taken with a shard's and a session's lock held, and no other after it
	rooms map[string]sessionID // guarded by mu
}

// add reports whether the code was free, and is now the room's.
func (c *roomCodes) add(code string, id sessionID) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, taken := c.rooms[code]; taken {
		return false
	}
	c.rooms[code] = id
	return true
}

func (c *roomCodes) remove(code string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.rooms, code)
}

func (c *roomCodes) find(code string) (id sessionID, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	id, ok = c.rooms[code]
	return id, ok
}

func (h *memoryHub) Find(_ context.Context, code string) (sessionID, error) {
	if id, ok := h.codes.find(code); ok {
		if s := h.lock(id); s != nil {
			s.mu.Unlock()
			return id, nil
		}
	}
	return sessionID{}, errGone
}

func (h *memoryHub) Get(_ context.Context, id sessionID) (m meta, taken int, err error) {
	s := h.lock(id)
	if s == nil {
		return meta{}, 0, errGone
	}
	defer s.mu.Unlock()
	return s.meta(), s.taken(), nil
}

func (s *memorySession) meta() meta { return meta{ID: s.id, Expires: s.expires, Room: s.room} }

func (h *memoryHub) Update(_ context.Context, id sessionID, c change) (m meta, taken int, err error) {
	s := h.lock(id)
	if s == nil {
		return meta{}, 0, errGone
	}
	defer s.mu.Unlock()
	if s.room == nil {
		return meta{}, 0, errGone
	}
	room := c.of(*s.room)
	s.room = &room
	return s.meta(), s.taken(), nil
}

// joinRoom is the part of memoryHub.join for a room, with mu held.
func (s *memorySession) joinRoom(r joinRequest, m *memorySeat, now time.Time) (v view, wake nudges, err error) {
	slot := s.claimed(r.resume)
	if slot != nil {
		v.resumed, wake, err = slot.resume(s.hub, now)
	} else {
		err = s.room.admit(r, len(s.seats))
	}
	if err != nil {
		return v, wake, err
	}
	if slot == nil {
		slot = &memorySlot{name: r.name, displayName: r.displayName, claim: r.claim, lastSeq: s.firstSeq()}
		s.seats = append(s.seats, slot)
		wake = s.announce(slot, event{kind: eventJoined, room: s.event(slot)})
	}
	m.session, m.slot = s, slot
	slot.holder, slot.v = m, r.v
	s.met(now)
	v.mail = len(slot.mail) > 0
	v.room = s.view(slot)
	return v, wake, nil
}

// claimed returns the slot that is held, or reserved, with this claim, or nil.
func (s *memorySession) claimed(c claim) *memorySlot {
	for _, slot := range s.seats {
		if c != (claim{}) && slot.claim == c {
			return slot
		}
	}
	return nil
}

// admit returns why a newcomer may not take a seat of a room where so many are
// taken.
func (room *roomMeta) admit(r joinRequest, taken int) error {
	switch {
	case room.Password != (passwordHash{}) && room.Password != r.password:
		return errWrongPassword
	case room.Locked:
		return errLocked
	case taken >= room.Max:
		return errRoomFull
	}
	return nil
}

func (s *memorySlot) member() member { return member{id: s.name, displayName: s.displayName} }

// host returns the longest-present member, or "".
func (s *memorySession) host() string {
	if len(s.seats) == 0 {
		return ""
	}
	return s.seats[0].name
}

func (s *memorySession) event(slot *memorySlot) *roomEvent {
	return &roomEvent{member: slot.member(), host: s.host()}
}

// view returns what slot's holder sees of the room.
func (s *memorySession) view(slot *memorySlot) *roomView {
	v := &roomView{self: slot.member(), host: s.host()}
	for _, other := range s.seats {
		if other != slot {
			v.members = append(v.members, other.member())
		}
	}
	return v
}

// member returns the slot called name, unless that is not's.
func (s *memorySession) member(name string, not *memorySlot) *memorySlot {
	for _, slot := range s.seats {
		if slot.name == name && slot != not {
			return slot
		}
	}
	return nil
}

// postAll does the work of Post for everyone else in a room, with mu held.
func (m *memorySeat) postAll(f frame) (wake nudges, err error) {
	f.keep() // several will hold the same bytes
	for _, slot := range m.session.seats {
		if slot == m.slot {
			continue
		}
		_, n, refused := m.post(slot, f)
		if refused != nil {
			err = refused
			continue
		}
		wake = append(wake, n)
	}
	return wake, err
}

// putOut takes the holder, who reads too slowly, out of a slot, and keeps it
// for their return. The caller holds mu, and tells them.
func (s *memorySession) putOut(slot *memorySlot) {
	slot.vacate(s.hub)
	s.lastLeft = time.Now()
	s.reserve(slot)
}

// remove takes a free slot out of the room, with mu held, and returns whom to
// tell.
func (s *memorySession) remove(slot *memorySlot) nudges {
	slot.empty(s.hub, dropPeerLeft)
	s.seats = slices.DeleteFunc(s.seats, func(other *memorySlot) bool { return other == slot })
	return s.announce(slot, event{kind: eventLeft, room: s.event(slot)})
}
